"""`LowRank` leaves: their form, how a function runs on them, how they stand.

* `leaf`: the leaf in place of a kernel; merging it, writing it out, counting.
* `no_array`: the error of a leaf that is used as an array.
* `low_rank`: functions that run on trees with such leaves.
* `narrow_heads`: kernels of attention whose heads are narrower.
* `serialize`: leaves known to `jax.export` and, where it is, to Flax.
* `stack`: layers of a scan taken apart and put together.
* `restored`: pairs that were restored as dictionaries.
* `store`: from float64 pairs to leaves, constants where they fit; `place`:
  on the devices of the kernels; `shardings`: their specs.
* `two_layers`: stock layers in place of pairs.
"""
