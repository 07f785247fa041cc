"""The best recipe in one call.

* `compress`: the public verb: collect, measure, candidates, choice, recipe.
* `problem`: what is to be compressed, to what share, and what counts as near.
* `unlabelled`: the loss where none is given.
* `candidates`: what a kind of candidate is, and which of several is nearest.
* `factor_pairs`, `narrower_heads`: the kinds that there are.
* `holdout`: whether what fits few data beats what looks at none.
"""
