"""Streaming batches through a function: devices, passes, plans.

* `collect`: the public verb; `plan` says before what it will cost.
* `one_pass`, `passes`: one pass over the batches, and several that fit.
* `devices`, `pmapped`: where a step runs, and where its sums are.
* `running_sums`, `accumulation`: sums between batches, without drift.
* `snapshots`: sums on disk, with the place in the data that they reach.
"""
