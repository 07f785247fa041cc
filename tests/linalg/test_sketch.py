"""Inputs so wide that a sketch of S is summed in place of S."""

import functools

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.factorization.kernels import kernels
from utilized_rank.linalg import sketch as sketches
from utilized_rank.linalg.nystrom import nystrom

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ALL = [('.*', 4)]
# Float32 sums of float32 products, against float64: relative to the largest.
TOLERANCE = 1e-5


def rows(n, d, decay, mean=0.0, seed=0):
  """Rows whose spectrum falls as i^-decay, about a mean."""
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
  scale = np.arange(1, d + 1) ** (-decay / 2)
  return (rng.normal(size=(n, d)) * scale) @ basis.T + mean * basis[0]


def sketch_of(x, columns):
  """`Sketch.sums` of rows, in float64."""
  c = x.T @ x
  y = c @ sketches.signs(x.shape[1], columns)
  return np.hstack([y, np.diagonal(c)[:, None]])


def true_moment(x, about_mean=False):
  if about_mean:
    x = x - x.mean(0)
  return x.T @ x / len(x)


# --- sums ---


@pytest.mark.parametrize(
  'name', ['matmul', 'conv_same', 'conv_nchw', 'conv_grouped']
)
def test_sums_are_those_of_the_rows(name, monkeypatch):
  monkeypatch.setattr(sketches, 'saves', lambda d, columns: True)
  form = forms.FORMS[name]
  params, x = form.params(0), form.inputs(0)
  moments = jax.jit(ur.capture(form.fn, sketch=ALL))(params, x)[1]
  for path, read in form.rows(params, x).items():
    moment = moments[path]
    assert moment.entry.side == 'sketch' and moment.entry.columns == 4
    omega = sketches.signs(read.shape[-1], 4)
    c = np.einsum('...nd,...ne->...de', read, read)
    got = moment.sums.panels
    close = functools.partial(
      np.testing.assert_allclose, rtol=0, atol=TOLERANCE * np.abs(c).max() * 4
    )
    close(got.range, c @ omega)
    close(got.diagonal, np.diagonal(c, axis1=-2, axis2=-1))
    np.testing.assert_allclose(
      moment.mean, read.mean(-2), atol=TOLERANCE * np.abs(read).max()
    )


def test_signs_are_what_they_were():
  """Sketches in files are read with the signs that they were made with."""
  got = sketches.signs(5, 9)
  assert got.shape == (5, 9) and set(np.unique(got)) == {-1.0, 1.0}
  assert got[0].tolist() == [-1, 1, 1, -1, -1, 1, -1, -1, -1]
  wide = sketches.signs(4096, 64)
  # Independent signs: products of columns are of the order of sqrt(d).
  inner = wide.T @ wide - 4096 * np.eye(64)
  assert np.abs(inner).max() < 6 * np.sqrt(4096)
  assert np.abs(wide.mean(0)).max() < 6 / np.sqrt(4096)


# --- what they say of S ---


@pytest.mark.parametrize('decay', [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize('mean', [0.0, 3.0])
@pytest.mark.parametrize('columns', [1, 8, 24])
def test_what_a_sketch_knows_bounds_what_there_is(decay, mean, columns):
  x = rows(300, 40, decay, mean)
  for about_mean in (False, True):
    s = true_moment(x, about_mean)
    center = x.mean(0) if about_mean else None
    known = nystrom(sketch_of(x, columns), len(x), center)
    noise = 1e-6 * np.trace(s)  # what the cut at float32's rounding leaves
    sure = (known.vectors * known.values) @ known.vectors.T
    assert np.linalg.eigvalsh(s - sure).min() > -noise
    assert abs(known.trace - np.trace(s)) < noise
    assert abs(known.unseen - np.trace(s - sure)) < noise
    taken = known.matrix()
    np.testing.assert_allclose(np.trace(taken), np.trace(s))
    # No directions hold more than `unseen` beside what is said.
    assert np.linalg.eigvalsh(s - sure).max() < known.unseen + noise
    np.testing.assert_allclose(known.times(x[:7].T), taken @ x[:7].T)
    basis = known.basis()
    assert np.all(np.diff(basis.values) <= 1e-12 * basis.values[0])
    np.testing.assert_allclose(
      basis.vectors.T @ basis.vectors, np.eye(40), atol=1e-10
    )
    np.testing.assert_allclose(
      (basis.vectors * basis.values) @ basis.vectors.T,
      taken,
      atol=1e-10 * basis.values[0],
    )
    true = np.linalg.eigvalsh(s)[::-1]
    shares = np.cumsum(true) / true.sum()
    for energy in (0.3, 0.9, 0.95, 0.99, 0.999):
      least, most = known.energy_ranks(energy)
      assert 1 <= least <= int(np.argmax(shares >= energy)) + 1 <= most <= 40


def test_data_of_few_directions_are_known_whole():
  x = RNG.normal(size=(200, 5)) @ RNG.normal(size=(5, 40))
  known = nystrom(sketch_of(x, 8), len(x))
  s = true_moment(x)
  np.testing.assert_allclose(known.matrix(), s, atol=1e-6 * np.trace(s))
  assert known.unseen < 1e-6 * np.trace(s)
  assert (
    known.energy_ranks(0.9) == (int(np.argmax(ur_energy(s) >= 0.9)) + 1,) * 2
  )


def ur_energy(s):
  values = np.linalg.eigvalsh(s)[::-1]
  return np.cumsum(values) / values.sum()


def test_an_input_of_zeros():
  known = nystrom(np.zeros((6, 4)), 1)
  assert known.unseen == known.rest == 0 and known.energy_ranks(0.9) == (0, 0)
  np.testing.assert_array_equal(known.matrix(), np.zeros((6, 6)))
  assert known.basis().vectors.shape == (6, 6)


@pytest.mark.parametrize('shape', [(40, 12), (40, 60)])
@pytest.mark.parametrize('method', ['output', 'scaled', 'weight', 'utilized'])
def test_the_error_is_within_the_bound(shape, method):
  """Of every method's W': what it leaves, on the data themselves."""
  x = rows(400, 40, 1.0)
  w = RNG.normal(size=shape)
  params = {'w': w.astype(np.float32)}
  run = lambda **kw: ur.capture(lambda p, x: x @ p['w'], **kw)(
    params, x.astype(np.float32)
  )[1]
  moments, whole = run(sketch=[('w', 16)]), run()
  assert moments['w'].entry.side == 'sketch'
  left = {}
  for name, m in (('sketch', moments), ('whole', whole)):
    low = ur.factorize(
      params, m, {'w': 8}, method=method, compensate_mean=False
    )['w']
    left[name] = params['w'] - np.asarray(low.a) @ np.asarray(low.b)
  s, taken = true_moment(x), moments['w'].second
  off = left['sketch']
  error = lambda s, off: np.trace(off.T @ s @ off)
  noise = 1e-4 * np.trace(w.T @ s @ w)  # factors are float32
  ((_, (kernel,)),) = kernels(params, moments)
  known = kernel.sketched()
  sure = (known.vectors * known.values) @ known.vectors.T
  bound = error(sure, off) + known.unseen * np.linalg.norm(off, 2) ** 2
  assert error(sure, off) - noise < error(s, off) < bound + noise
  np.testing.assert_allclose(taken, known.matrix(), rtol=0, atol=1e-6)
  if method == 'output':
    # Not far from the optimum, which it cannot beat.
    best = error(s, left['whole'])
    assert best - noise < error(s, off) < 1.3 * best


# --- in the library ---


def stacked(params, x):
  def layer(x, w):
    return x + jnp.tanh(x @ w['up']) @ w['down'], None

  x = jax.lax.scan(layer, x, params['layers'])[0]
  return (x @ params['q']) * (x @ params['k'])


@pytest.fixture(scope='module')
def job():
  draw = lambda *s: (RNG.normal(size=s) / np.sqrt(s[-2])).astype(np.float32)
  layers = {'up': draw(3, 6, 40), 'down': draw(3, 40, 6)}
  params = {'layers': layers, 'q': draw(6, 5), 'k': draw(6, 5)}
  batches = [rows(90, 6, 1.0, 0.5, i).astype(np.float32) for i in range(2)]
  return params, batches


RULES = [('layers/down', 9), ('.*', 5)]


def collected(job, **kwargs):
  params, batches = job
  return ur.collect(stacked, params, batches, progress=False, **kwargs)


def test_kernels_that_it_would_not_help_are_measured_whole(job):
  moments = collected(job, sketch=RULES)
  sides = {e.path: (e.side, e.columns) for e in moments.table}
  assert sides.pop('layers/down') == ('sketch', 9)
  assert set(sides.values()) == {('input', 0)}
  assert moments['q'].sums is moments['k'].sums
  plain = collected(job)
  np.testing.assert_array_equal(moments['q'].second, plain['q'].second)
  assert plain['layers/down'].unseen is None
  down = moments['layers/down']
  assert down.second.shape == (3, 40, 40) and down.unseen.shape == (3,)
  np.testing.assert_allclose(
    np.trace(down.second, axis1=1, axis2=2),
    np.trace(plain['layers/down'].second, axis1=1, axis2=2),
    rtol=1e-5,
  )
  with pytest.raises(ValueError, match='there is a sketch'):
    down.sums.second  # noqa: B018
  centred = down.covariance
  known = nystrom(
    np.asarray(down.sums.panels.sums)[1], int(down.count[1]), down.mean[1]
  )
  np.testing.assert_allclose(centred[1], known.matrix(), atol=1e-5)


def test_inputs_that_are_shared_share_a_sketch():
  params = {n: RNG.normal(size=(40, 3)).astype('f4') for n in 'qkv'}
  fn = lambda p, x: [x @ p[n] for n in 'qkv']
  x = rows(50, 40, 1.0).astype(np.float32)
  moments = ur.capture(fn, sketch=[('q|k', 6), ('v', 7)])(params, x)[1]
  assert moments['q'].sums is moments['k'].sums is not moments['v'].sums
  assert len(moments.sums) == 2


@pytest.mark.parametrize('how', ['float32', 'compensated', 'float64'])
def test_every_device_adds_up(job, how):
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
  want = collected(job, sketch=RULES, mesh=one)['layers/down'].sums.panels.sums
  got = collected(job, sketch=RULES, accumulate=how)
  got = got['layers/down'].sums.panels.sums
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_parameters_on_a_mesh(job, kind):
  params, batches = job
  types = (getattr(jax.sharding.AxisType, kind),) * 2
  mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=types)
  place = lambda a: jax.device_put(
    a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  )
  with jax.set_mesh(mesh):
    got = ur.collect(
      lambda p, x: jnp.tanh(x @ p['up']) @ p['down'],
      jax.tree.map(lambda a: place(a[0]), params['layers']),
      batches,
      sketch=[('down', 9), ('up', 9)],
      mesh=mesh,
      batch_axes=['data'],
      progress=False,
    )['down']
  want = np.tanh(
    np.concatenate(batches).astype(np.float64) @ params['layers']['up'][0]
  )
  want = sketch_of(want, 9)
  np.testing.assert_allclose(
    got.sums.panels.sums, want, rtol=0, atol=TOLERANCE * np.abs(want).max()
  )


def test_padding_does_not_count():
  w = RNG.normal(size=(40, 3)).astype(np.float32)
  x = rows(21, 40, 1.0).astype(np.float32)
  real = np.arange(21) % 3 > 0
  run = lambda batches, **kw: ur.collect(
    lambda w, b: b['x'] @ w, w, batches, sketch=[('', 6)], progress=False, **kw
  )['']
  got = run([{'x': x, 'real': real}], mask='real')
  want = run([{'x': x[real]}])
  assert int(got.count) == int(want.count) == real.sum()
  np.testing.assert_allclose(
    got.sums.panels.sums, want.sums.panels.sums, rtol=1e-5, atol=1e-4
  )


def test_interrupted_merged_and_saved(job, tmp_path):
  params, batches = job
  whole = collected(job, sketch=RULES)
  one, two = (
    ur.collect(stacked, params, [b], sketch=RULES, progress=False)
    for b in batches
  )
  both = ur.merge_moments(one, two)
  assert both.table == whole.table
  for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  ur.save(tmp_path / 'moments', whole)
  read = ur.load(tmp_path / 'moments')
  assert read.table == whole.table
  for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
  other = collected(job, sketch=[('layers/down', 8)])
  with pytest.raises(ValueError, match='has 9 columns in the first .* 8 in'):
    ur.merge_moments(whole, other)
  with pytest.raises(ValueError, match='has 9 columns in the first .* 0 in'):
    ur.merge_moments(whole, collected(job))

  def stop():
    yield batches[0]
    raise KeyboardInterrupt

  options = dict(
    checkpoint_dir=tmp_path / 'sums', checkpoint_every=1, progress=False
  )
  with pytest.raises(KeyboardInterrupt):
    ur.collect(stacked, params, stop(), sketch=RULES, **options)
  with pytest.raises(ValueError, match='sums of another collection'):
    ur.collect(stacked, params, batches, **options)
  again = ur.collect(stacked, params, batches, sketch=RULES, **options)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_plan_counts_a_sketch(job):
  params, (batch, _) = job
  costs = ur.plan(stacked, params, batch, sketch=RULES)
  kernel = costs.kernels['layers/down']
  assert kernel.sums_bytes == 3 * 4 * (40 * 10 + 40 + 1)
  assert kernel.flops == 3 * (4 * 90 * 40 * 9 + 2 * 90 * 40)
  (line,) = (s for s in str(costs).splitlines() if 'layers/down' in s)
  assert ' sketch  ' in line
  text = str(ur.find_sites(stacked, params, batch, sketch=RULES))
  assert 'dot; sketch of 9 columns' in text
  limit = int(costs.peak_bytes * 0.97)
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
  parts = collected(job, sketch=RULES, memory_limit=limit, mesh=one)
  whole = collected(job, sketch=RULES)
  assert {e.number for e in parts.table} == {0, 1}
  for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_report_says_what_it_knows_by_a_sketch(job, tmp_path):
  params, _ = job
  moments, whole = collected(job, sketch=RULES), collected(job)
  for centered in (False, True):
    measure = functools.partial(
      ur.measure, params, energy=0.9, centered=centered, progress=False
    )
    report, known = measure(moments), measure(whole)
    for name, layer in report.items():
      assert layer.side == known[name].side or layer.path == 'layers/down'
      if layer.side == 'sketch':
        assert layer.k_in_least <= known[name].k_in <= layer.k_in
        assert 0 < layer.unseen < 1 and layer.columns == 9
        assert len(layer.spectrum_in) == 40
  text = '3 of 8 measured by a sketch, where k_S is the most it can be; at most'
  assert text in str(report) and text in report.html()
  one = report.json()['layers']
  assert [layer['columns'] for layer in one].count(9) == 3
  report.save(tmp_path / 'report.json')
  again = type(report).load(tmp_path / 'report.json')
  assert str(again) == str(report)


def test_what_a_sketch_is_used_for(job):
  """Everything that is made of S is made of what it is taken for."""
  params, _ = job
  moments = collected(job, sketch=RULES)
  ur.project(params, moments)
  assert ur.energy_ranks(params, moments, energy=0.3)['layers/down'] < 4
  low = ur.factorize(params, moments, {'layers/down': 6, 'q': 3})
  full = {'layers/down': 6}
  dense = ur.merge(ur.factorize(params, moments, full, compensate_mean=False))
  np.testing.assert_allclose(
    dense['layers']['down'], params['layers']['down'], atol=1e-4
  )
  assert low['layers']['down'].rank == 6
  budget = ur.budget_ranks(
    params, moments, params_fraction=0.5, metric='output', progress=False
  )
  assert set(budget) <= {'layers/down', 'layers/up', 'q', 'k'}


@pytest.mark.parametrize(
  ('rules', 'said'),
  [
    ([('layers/down', -1)], r'sketch rule .*-1.* is not a \(regex, int\)'),
    ([('layers/down', 1.5)], 'interpreted as an integer'),
    ([('layers/down', True)], 'at least 0, and a number'),
    ([('layer/down', 4)], "sketch rule 'layer/down' matched no leaf"),
    (['down'], 'sketch rule'),
  ],
)
def test_rules_that_are_none_are_named(job, rules, said):
  with pytest.raises(ValueError, match=said):
    collected(job, sketch=rules)


def test_one_kernel_is_measured_in_one_way(job):
  with pytest.raises(ValueError, match='layers/down.*from_outputs= and by sk'):
    collected(job, sketch=RULES, from_outputs=[('layers/down', True)])
