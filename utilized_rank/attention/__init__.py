"""Kernels of attention that act in pairs: found, and given narrower heads.

* `find_attention`: pairs by the flow of data; `follow`, `pairing` and `repeats`
  behind.
* `heads`: what a pair is, head by head.
* `joint`: one head's factors of every rank.
* `factorize_heads`: narrower heads, and their ranks.
"""
