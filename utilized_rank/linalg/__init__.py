"""float64 on the host, Gram matrices on the device: arrays in, arrays out.

* `eigh`: eigendecompositions, and what to do where one fails.
* `subspace`: eigenbases of S and T, energies, the paper's projection.
* `best_pairs`: pairs of factors that minimise an error, and their tails.
* `gram`: sums of x x^T over rows, half of which is multiplied.
* `overflow`: what sums that are not finite say.
* `sketch`, `nystrom`: products of S with few vectors, and what S they tell.
"""
