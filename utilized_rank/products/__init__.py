"""One product of an activation and a kernel, dense or as two.

* `product`: what the axes of a product mean.
* `dot_general`, `convolution`: the two that there are; `describe` chooses.
* `factors`, `factored`: a pair in place of the kernel, turned to the product.
* `gauge`: the r^2 numbers that a pair does not need.
"""
