"""What is summed over one batch, for which rows, and what the sums say.

* `moments`: sums, means and second moments of every kernel.
* `merging`: the moments of two data sets, added.
* `sites`: the products of every leaf, or why there is none.
* `coverage`: which share of the parameters kernels hold.
* `capture`: a function with what its kernels read beside its outputs.
* `collector`, `assembly`: what a walk emits, and how it becomes sums.
* `rows`, `counting`, `masks`: which rows count, and what is padding.
* `sides`, `measurement`: from which side each kernel is measured.
* `gradients`, `fisher`: second moments of the loss's gradient at outputs.
"""
