"""Ways to choose ranks, one public function a file.

* `energy`: the paper's r; `search`: the paper's search under a tolerance.
* `uniform`: one share for every kernel.
* `budget`: the least predicted damage; of `offers`, solved in `knapsack`.
* `predict`: what ranks should cost.
* `tune`: ranks tried on data, by `trials` with one compilation.
* `latency`: how long products take.
"""
