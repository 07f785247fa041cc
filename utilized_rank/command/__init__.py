"""The command `utilized-rank`.

* `main`: which command, and errors of one line.
* `run`: an experiment of `configs/`.
* `measure`, `compress`: a checkpoint, on inputs that are given.
* `subject`: the network and the inputs of these two.
* `configs`: experiments by name, in a checkout and in an installation.
"""
