"""The best recipe in one call.

* `compress`: the public verb: collect, measure, candidates, choice,
  training, recipe.
* `forecast`: what that will take, from a small piece of it.
* `problem`: what is to be compressed, to what share, and what counts as near.
* `unlabelled`: the loss where none is given.
* `candidates`: what a kind of candidate is, and which of several is nearest.
* `factor_pairs`, `narrower_heads`, `narrower_layers`: the kinds that there are.
* `narrowed`: what is narrower within a budget, and pairs for the rest of it.
* `refined`: the chosen tree, trained on the dense outputs.
* `journal`: what each stage took; `describe`: what was chosen, for the report.
* `independence`: whether data are few; `holdout`: what is nearest if they are.
"""
