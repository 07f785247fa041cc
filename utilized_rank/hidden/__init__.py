"""Hidden layers that are wider than the data need.

* `find_hidden`: the public verb: units between two kernels, by data flow.
* `flow`: the analysis of the traced function under it; `ends`, its kernels.
* `layers`: what was found: kernels, vectors, where the units are in them.
* `resizing`: whether the function takes a layer's width from its leaves.
* `order`: units in the order they are kept; the rest read from them (numpy).
* `kept`: that for every layer, from weights and moments.
* `narrow_hidden`: narrower trees, and what every width costs.
* `cut_moments`: moments of the narrower kernels.
* `budget_widths`: widths of least predicted damage within a budget.
* `one_budget`: hidden layers, heads and pairs of factors in one budget.
"""
