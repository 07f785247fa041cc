"""Rows in a function cut into blocks: every way of writing a product."""

import evaluate
import forms
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.refit import blocks
from utilized_rank.refit import readings
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

FORMS = forms.FORMS


def whole(path):
  del path
  return 'one block'


def gram_sums(fn, params, x, group=whole):
  """Per path, (matrices, d, d) sums that reads in all blocks add up to."""
  sites = ur.find_sites(fn, params, x)
  layouts = {path: site.layout for path, site in sites.items()}
  program = blocks.cut(fn, params, x, layouts, group)
  named, _ = paths.flatten(params)
  state = program.start(x)
  found = {
    path: np.zeros((y.num_groups, y.matrix_shape[0], y.matrix_shape[0]))
    for path, y in layouts.items()
  }
  for block in program.blocks:
    run = lambda values, block=block: program.read(
      block, named, values, block.paths
    )
    # Primitive by primitive: nothing is compiled as a whole.
    given, reads = run(blocks.needs_of(block, state))
    for r in reads:
      sums = readings.pair_sums(r.rows(), 2 * r.rows())
      np.testing.assert_allclose(2 * sums.cross, sums.second_hat, rtol=1e-6)
      members = r.members(layouts[r.path])
      found[r.path][list(members)] += np.asarray(sums.second_hat) / 4
    state = blocks.after(block, state, given)
  return found, program, state


@pytest.mark.parametrize('name', FORMS)
def test_rows_of_every_form(name):
  form = FORMS[name]
  params, x = form.params(0), form.inputs(0)
  found, program, state = gram_sums(form.fn, params, jnp.asarray(x))
  want = form.rows(params, x)
  assert set(found) == set(want)
  for path, sums in found.items():
    d = sums.shape[-1]
    each = np.asarray(want[path]).reshape(len(sums), -1, d)
    np.testing.assert_allclose(
      # Sums are float32, of a few hundred rows at most.
      sums,
      np.swapaxes(each, -1, -2) @ each,
      rtol=1e-5,
      atol=1e-5,
    )
  assert len(program.blocks) == 2
  # What is left after the last block are the function's outputs.
  want_out = jax.tree.leaves(evaluate.call(form.fn, params, x))
  got = list(state.values())
  assert any(
    g.shape == w.shape and np.allclose(g, w, rtol=1e-5, atol=1e-5)
    for g in got
    for w in want_out
  )


def layer(w, x):
  return jnp.tanh(x @ w['w'] + w['b'])


PARAMS = {
  'w': np.linspace(-1, 1, 48).reshape(3, 4, 4).astype(np.float32),
  'b': np.ones((3, 4), np.float32),
}


def by_scan(p, x, wrap=lambda f: f, **kwargs):
  return lax.scan(wrap(lambda x, w: (layer(w, x), x)), x, p, **kwargs)


def by_loop(p, x, order=(0, 1, 2)):
  for i in order:
    x = layer({'w': p['w'][i], 'b': p['b'][i]}, x)
  return x


@pytest.mark.parametrize('way', ['scan', 'reverse', 'remat', 'jit', 'loop'])
def test_layers_of_a_stack_are_blocks_of_their_own(way):
  x = jnp.asarray(forms.FORMS['matmul'].inputs(1))
  reverse = way == 'reverse'
  wrap = {'remat': jax.checkpoint, 'jit': jax.jit}.get(way, lambda f: f)
  fn = lambda p, x: by_scan(p, x, wrap, reverse=reverse)[0]
  found, program, state = gram_sums(
    by_loop if way == 'loop' else fn, PARAMS, x, None
  )
  assert [len(b.reads) for b in program.blocks] == [0, 1, 1, 1]
  order = (2, 1, 0) if reverse else (0, 1, 2)
  layout = ur.Layout.of((3, 4, 4), (0,), (1,), (2,))
  members = [r.members(layout) for b in program.blocks for r in b.reads]
  assert members == [(i,) for i in order]
  h = np.asarray(x, np.float64)
  for i in order:
    np.testing.assert_allclose(found['w'][i], h.T @ h, rtol=1e-5)
    h = np.tanh(h @ PARAMS['w'][i] + PARAMS['b'][i])
  (out,) = state.values()
  np.testing.assert_allclose(out, h, rtol=1e-5)


def test_the_outputs_of_a_scans_steps_are_stacked_in_their_order():
  x = jnp.asarray(forms.FORMS['matmul'].inputs(1))
  for reverse in (False, True):
    fn = lambda p, x, reverse=reverse: by_scan(p, x, reverse=reverse)
    _, _, state = gram_sums(fn, PARAMS, x)
    for want in jax.tree.leaves(fn(PARAMS, x)):
      assert any(
        got.shape == want.shape and np.allclose(got, want, rtol=1e-5)
        for got in state.values()
      )


def test_a_scan_without_the_kernels_is_not_written_out():
  def fn(p, x):
    return by_scan(p['stack'], x)[0] @ p['head']

  params = {'stack': PARAMS, 'head': np.eye(4, dtype=np.float32)}
  x = jnp.ones((2, 4))
  layouts = {'head': ur.find_sites(fn, params, x)['head'].layout}
  program = blocks.cut(fn, params, x, layouts)
  names = [e.primitive.name for e in program.blocks[0].piece.eqns]
  assert names.count('scan') == 1 and 'dot_general' not in names


def test_what_no_batch_changes_is_not_carried():
  def fn(p, x):
    mask = jnp.tril(jnp.ones((4, 4))) * jnp.exp(p['scale'])
    h = jnp.tanh(x @ p['v'].T)
    return (h @ p['w']) @ mask

  params = {
    'v': np.eye(4, dtype=np.float32),
    'w': np.eye(4, dtype=np.float32),
    'scale': np.float32(0.5),
  }
  x = jnp.ones((2, 4))
  sites = ur.find_sites(fn, params, x, select=[('[vw]', True)])
  program = blocks.cut(fn, params, x, {p: s.layout for p, s in sites.items()})
  assert [len(b.gives) for b in program.blocks] == [0, 1, 1]
  assert [len(b.needs) for b in program.blocks] == [0, 1, 1]


def looped(p, x):
  return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ p['w'], x)


def branched(p, x):
  return lax.cond(x.sum() > 0, lambda x: x @ p['w'], lambda x: x, x)


def indexed(p, x):
  at = jnp.argmax(x[0, :3])
  return x @ lax.dynamic_index_in_dim(p['w'], at, keepdims=False)


@pytest.mark.parametrize(
  ('fn', 'shape', 'why'),
  [
    (looped, (4, 4), 'inside a while loop'),
    (branched, (4, 4), 'inside a while loop, a branch'),
    (indexed, (3, 4, 4), 'picked by a computed index'),
  ],
)
def test_rows_that_two_runs_do_not_share_are_refused(fn, shape, why):
  params, x = {'w': jnp.ones(shape)}, jnp.ones((2, 4))
  with pytest.raises(ur.UnsupportedError, match=f"'w' is {why}.*leave 'w'"):
    ur.anchor(fn, params, [x], {'w': 2}, progress=False)
