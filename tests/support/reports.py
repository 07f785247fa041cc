"""Layer reports and runs that are made up, for the tests of what shows them."""

import numpy as np

from utilized_rank.report import report

# What `tables.run_table` takes.
RUNS = [
  {
    'params_fraction': 1.0, 'params': 205_322, 'flops': 6_812_416,
    'latency_ms': 1.92, 'test_accuracy': 0.9861,
    'test_accuracy_before_finetune': None,
  },
  {
    'params_fraction': 0.5, 'params': 108_100, 'flops': 3_512_000,
    'latency_ms': 1.31, 'test_accuracy': 0.9833, 'method': 'output',
    'test_accuracy_before_finetune': 0.9611,
  },
  {
    'params_fraction': 0.25, 'params': 59_300, 'flops': None,
    'latency_ms': None, 'test_accuracy': 0.9806,
    'test_accuracy_before_finetune': 0.8722,
  },
]  # fmt: skip


def layer(path, index=(), d_in=64, d_out=256, k_in=21, k_out=70, decay=0.7):
  return report.LayerReport(
    path=path,
    index=index,
    d_in=d_in,
    d_out=d_out,
    count=16_384,
    energy=0.99,
    k_in=k_in,
    k_out=k_out,
    spectrum_in=decay ** np.arange(d_in),
    spectrum_out=decay ** np.arange(d_out),
    projected=0.021,
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
