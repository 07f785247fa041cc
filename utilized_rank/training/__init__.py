"""Training loops in optax.

* `finetune`: the public verb, of any compressed tree; `goal` what it minimises
  and keeps the best by.
* `train`: training of any classifier on any tree; `config` its options.
* `loop`: the one loop behind both; `step` one update of it, `feeding` its
  batches and mesh.
* `parts`: which arrays of a tree are trained, and their names.
* `optimizers`: AdamW and Muon that know of pairs; `balance` of where they
  begin.
* `objectives`, `masked_autoencoder`: what is minimised.
* `metrics`, `evaluate`: what is measured meanwhile, and at the end.
* `batch_statistics`: running statistics for parameters as they are now.
"""
