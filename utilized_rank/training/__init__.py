"""Training loops in optax.

* `train`: training and fine-tuning of any classifier on any tree.
* `objectives`, `masked_autoencoder`: what is minimised.
* `metrics`, `evaluate`: what is measured meanwhile, and at the end.
* `batch_statistics`: running statistics for parameters as they are now.
"""
