"""Streaming batches through a function: devices, passes, plans.

* `collect`: the public verb; `plan` says before what it will cost.
* `one_pass`, `passes`: one pass over the batches, and several that fit.
* `placement`: on which mesh, and what of it the function sees.
* `devices`, `pmapped`: how a step runs there, and where its sums are.
* `running_sums`, `accumulation`: sums between batches, without drift.
* `snapshots`: sums on disk, with the place in the data that they reach.
"""
