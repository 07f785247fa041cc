"""Trees, recipes and interrupted loops on disk.

* `checkpoint`: trees with everything needed to read and to trust them.
* `containers`: dictionaries of other classes than `dict`; `modules`: of NNX
  and Equinox.
* `safetensors_file`: factors for those who do not have this library.
* `recipe`: what a compressed tree is made of, without its data.
* `resume`: checkpoints of an interrupted loop.
"""
