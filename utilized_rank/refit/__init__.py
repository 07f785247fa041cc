"""Factors fitted to what the compressed network feeds them.

* `anchor`: block after block, each to what the dense network does.
* `anchored_fit`: the closed form of one kernel.
* `refine`: factors trained on dense outputs, block by block.
* `blocks`, `readings`, `streams`: a function cut into blocks, what products
  read there, and two runs of it held between two blocks.
* `alike`: one program for all steps that are the same computation.
"""
