"""Trees, recipes and interrupted loops on disk.

* `checkpoint`: trees with everything needed to read and to trust them.
* `containers`: dictionaries of other classes than `dict`.
* `recipe`: what a compressed tree is made of, without its data.
* `resume`: checkpoints of an interrupted loop.
"""
