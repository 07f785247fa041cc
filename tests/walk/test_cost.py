"""What a traced function costs: products counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from utilized_rank.walk.cost import forward_flops


@pytest.mark.quick
def test_loops_count_as_often_as_they_run():
  w, x = jnp.zeros((4, 4)), jnp.zeros((5, 4))
  once = 2 * 5 * 4 * 4

  def loop(w, x):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=7)[0]

  assert forward_flops(lambda w, x: x @ w, w, x) == once
  assert forward_flops(loop, w, x) == 7 * once
  assert forward_flops(jax.jit(loop), w, x) == 7 * once


def test_a_branch_counts_as_its_most_expensive_one():
  w, x = jnp.zeros((4, 4)), jnp.zeros((5, 4))

  def branch(w, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

  assert forward_flops(branch, w, x) == 2 * (2 * 5 * 4 * 4)


@pytest.mark.parametrize('groups', [1, 2])
def test_a_convolution_counts_what_each_output_reads(groups):
  x, w = jnp.zeros((2, 6, 6, 4)), jnp.zeros((3, 3, 4 // groups, 8))
  conv = lambda w, x: jax.lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )
  outputs = 2 * 6 * 6 * 8
  assert forward_flops(conv, w, x) == 2 * outputs * 3 * 3 * 4 // groups
