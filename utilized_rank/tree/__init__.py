"""Names of a tree's leaves, and each leaf seen as matrices.

* `structure`: containers and ties, a tree without its leaves.
* `paths`: leaves by path, rules over paths, kernels that are one array.
* `layout`, `recut`: how an array is laid out from one leaf, and as what matrix.
"""
