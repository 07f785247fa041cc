"""Numbers per example: how far outputs are, and what a label costs.

* `divergence`: how far outputs are from the dense ones.
* `logits`: cross-entropy and distillation of logits.
* `sampled`: losses without labels: each example draws what it is judged by.
"""
