"""What importing costs, and which way imports point."""

import ast
import pathlib
import subprocess
import sys

import pytest

import utilized_rank

ROOT = pathlib.Path(utilized_rank.__file__).parent

# Lower rows may be imported by higher ones, not the other way round.
LAYERS = [
  'accumulation compat progress files layout masks paths depth look processes '
  'svg divergence program',
  'tracing numerics gram tables factors gauge agreement',
  'sketch',
  'product axes factored',
  'axis_rules',
  'flow',
  'rows',
  'contraction convolution padding',
  'flops values sharded interpret control products',
  'subspace',
  'nystrom',
  'moments threads sides',
  'sites lowrank layers dense heads narrow',
  'assembly',
  'collector flatten readings spread substitution',
  'capture kernels allocation pairing follow',
  'checkpoint methods plots gradients fisher comparison_plots',
  'certify leaves attention measurement snapshots',
  'shared latency running',
  'division',
  'families plan',
  'passes feeding',
  'offers recipe',
  'ranks trials joint',
  'collect factorize search anchoring blocks factorize_heads',
  'streams narrowed',
  'anchor',
  'refine',
  'page report tune problem',
  'comparison comparison_page candidates',
  'factor_pairs holdout',
  'narrower_heads',
  'compress',
]
# They need flax, optax, TFDS or absl, and are imported by name.
OUTER = {
  'arrays',
  'augment',
  'batch_statistics',
  'compress_config',
  'costs',
  'data',
  'digits',
  'evaluate',
  'losses',
  'mae',
  'metrics',
  'models',
  'network',
  'objectives',
  'options',
  'pipeline',
  'prepared',
  'preprocess',
  'resume',
  'shrink',
  'tfrecord',
  'train',
  'workdir',
}


def imports_of(path):
  """(module, whether it is imported when the file is)."""
  tree = ast.parse(path.read_text())
  lazy = {
    id(node)
    for f in ast.walk(tree)
    if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    for node in ast.walk(f)
  }
  for guard in ast.walk(tree):
    if isinstance(guard, ast.If) and 'TYPE_CHECKING' in ast.dump(guard.test):
      lazy |= {id(node) for node in ast.walk(guard)}
  for node in ast.walk(tree):
    eager = id(node) not in lazy
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, eager
    elif isinstance(node, ast.ImportFrom):
      if node.module == 'utilized_rank':
        for alias in node.names:
          yield f'utilized_rank.{alias.name}', eager
      else:
        yield node.module, eager


def modules():
  for path in sorted(ROOT.rglob('*.py')):
    name = path.relative_to(ROOT).with_suffix('').parts[0]
    if name != '__init__':
      yield name, path


def test_every_module_has_a_place():
  placed = {m for row in LAYERS for m in row.split()} | OUTER
  assert {name for name, _ in modules()} <= placed


def test_imports_point_one_way():
  rank = {m: i for i, row in enumerate(LAYERS) for m in row.split()}
  for name, path in modules():
    for module, eager in imports_of(path):
      parts = module.split('.')
      if parts[0] != 'utilized_rank' or len(parts) < 2 or name in OUTER:
        continue
      target = parts[1]
      assert target not in OUTER, f'{name} imports {target}'
      if eager and target in rank:
        assert rank[target] <= rank[name], f'{name} imports {target}'


def test_the_core_imports_jax_and_numpy_alone():
  allowed = {'jax', 'numpy', 'utilized_rank', *sys.stdlib_module_names}
  for name, path in modules():
    if name in OUTER:
      continue
    for module, eager in imports_of(path):
      assert not eager or module.split('.')[0] in allowed, (name, module)


def test_jax_internals_are_touched_in_one_file():
  for name, path in modules():
    text = path.read_text()
    for private in ('jax._src', 'jax.extend', 'jax.interpreters'):
      assert private not in text or name == 'compat', (name, private)


@pytest.mark.parametrize('module', ['utilized_rank', 'utilized_rank.pipeline'])
def test_importing_loads_no_tensorflow(module):
  code = (
    f'import sys, {module}; '
    "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code],
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'


def test_importing_loads_no_more_than_jax_and_numpy():
  code = (
    'import jax, jax.numpy, jax.sharding, jax.extend.core, sys\n'
    'import jax.extend.source_info_util\n'
    'before = set(sys.modules)\n'
    'import utilized_rank\n'
    "tops = {m.split('.')[0] for m in set(sys.modules) - before}\n"
    'print(sorted(tops - set(sys.stdlib_module_names)))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "['utilized_rank']"
