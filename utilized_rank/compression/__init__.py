"""The best recipe in one call.

* `compress`: the public verb: collect, measure, candidates, choice, recipe.
* `problem`: what is to be compressed, to what share, and what counts as near.
* `candidates`: what a kind of candidate is, and which of several is nearest.
* `factor_pairs`, `narrower_heads`, `narrower_layers`: the kinds that there are.
* `narrowed`: what is narrower within a budget, and pairs for the rest of it.
* `holdout`: whether what fits few data beats what looks at none.
"""
