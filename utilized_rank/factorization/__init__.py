"""From measured kernels to factors of every rank.

* `kernels`: kernels of a tree beside their moments, checked;
  `input_basis`: those that read one value share its eigenbasis.
* `methods`: the ways to factorize one kernel, for every rank at once.
* `decompose`: every kernel at every rank, once.
* `factorize`, `project`: pairs in place of kernels; the paper's W'.
* `certify`: factors are believed when their error is the one predicted.
* `shared_left`: one left factor for kernels that read one value.
* `by_process`: kernels shared out over the processes of a job.
"""
