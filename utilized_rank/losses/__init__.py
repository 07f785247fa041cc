"""Numbers per example: how far outputs are, and what a label costs.

* `divergence`: how far outputs are from the dense ones.
* `logits`: cross-entropy and distillation of logits.
* `sampled`: the loss of labels drawn from the model's own distribution.
"""
