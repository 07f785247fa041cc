"""Files of tensors, read one tensor at a time, without running their code."""
