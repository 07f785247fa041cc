"""Factors fitted to what the compressed network feeds them.

* `anchor`: block after block, each to what the dense network does.
* `anchored_fit`: the closed form of one kernel.
* `refine`: factors trained on dense outputs, block by block.
* `distill`: all that is small, trained end to end; `trained`, what that
  is, and `descent`, the updates.
* `blocks`, `readings`, `streams`: a function cut into blocks, what products
  read there, and two runs of it held between two blocks.
* `alike`: one program for all steps that are the same computation.
"""
