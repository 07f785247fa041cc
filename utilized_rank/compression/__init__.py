"""The best recipe in one call.

* `compress`: the public verb.
* `holdout`: whether what fits few data beats what looks at none.
"""
