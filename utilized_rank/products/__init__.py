"""One product of an activation and a kernel, dense or as two.

* `product`: what the axes of a product mean.
* `dot_general`, `convolution`, `ragged_dot`: those that there are; `describe`
  chooses.
* `tiles`: rows of which each belongs to one of a group of kernels.
* `factors`, `factored`: a pair in place of the kernel, turned to the product.
* `gauge`: the r^2 numbers that a pair does not need.
"""
