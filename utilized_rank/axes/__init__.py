"""Which axes of a value run along examples and tokens.

* `where`: values whose axes are known.
* `rules`: what each primitive does to them.
* `flow`: from a batch to every product of a function.
"""
