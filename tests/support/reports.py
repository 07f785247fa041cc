"""Layer reports that are made up, for the tests of what shows them."""

import numpy as np

from utilized_rank.report import report


def layer(path, index=(), d_in=64, d_out=256, k_in=21, k_out=70):
  return report.LayerReport(
    path=path,
    index=index,
    d_in=d_in,
    d_out=d_out,
    count=16_384,
    energy=0.99,
    k_in=k_in,
    k_out=k_out,
    spectrum_in=0.7 ** np.arange(d_in),
    spectrum_out=0.7 ** np.arange(d_out),
    error_projected=0.021,
    error_bound=0.0098,
  )


def vit(blocks):
  return [
    layer(f'params/Transformer/encoderblock_{i}/{name}/kernel', k_in=k)
    for i in range(blocks)
    for k, name in enumerate(
      (
        'MultiHeadDotProductAttention_1/query',
        'MultiHeadDotProductAttention_1/key',
        'MlpBlock_3/Dense_0',
      ),
      start=1,
    )
  ]
