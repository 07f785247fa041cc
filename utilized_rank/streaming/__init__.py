"""A checkpoint that is larger than memory, block by block from disk to disk.

* `compress_checkpoint`, `measure_checkpoint`: the two jobs, resumable.
* `plan_checkpoint`: what they will take.
* `sweep`: a model cut into blocks whose weights are read when their turn is.
* `states`: what the batches are between two blocks, in files.
* `output`: the files of the compressed checkpoint.
* `ledger`: what is finished of a job that may be interrupted.
* `damages`: what ranks cost all blocks, known before the first is cut.
"""
