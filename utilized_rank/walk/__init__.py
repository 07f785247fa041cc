"""A traced function re-evaluated with its parameters followed.

* `tracing`: from a function to a jaxpr of arrays, dead code dropped.
* `values`: what travels through a walk, and who looks at it.
* `interpret`: the walk itself, one equation after the other.
* `sums`: products' outputs, followed to leaves that take their constants.
* `parts`, `pieces`, `scale`: slices of a leaf, and a leaf times a number.
* `control`, `shard_map`: calls, loops, branches and shards, rebuilt around it.
* `custom`: functions with a derivative rule of their own.
* `analysis`: what is known of every value, through calls, loops and branches.
* `rescaling`: products that only set the size of a parameter.
* `flatten`: a function as one list of equations, to be cut anywhere.
* `cost`: what a traced and what a compiled program costs.
* `compat`: every contact with JAX internals.
"""
