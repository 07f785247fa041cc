"""Figures hold every layer, group them sensibly, and raise no warning."""

import io
import re

import numpy as np
import pytest
import reports

from utilized_rank.report import depth
from utilized_rank.report import look
from utilized_rank.report import plots

pytestmark = pytest.mark.slow


def layer(path, d_in=6, d_out=8, k_in=3, k_out=5, decay=0.5, **options):
  return reports.layer(
    path,
    d_in=d_in,
    d_out=d_out,
    k_in=k_in,
    k_out=k_out,
    decay=decay,
    **options,
  )


def vit(blocks=3, order=None):
  names = [
    f'{kind}/kernel'
    for kind in (
      'MultiHeadDotProductAttention_1/query',
      'MultiHeadDotProductAttention_1/out',
      'MlpBlock_3/Dense_0',
      'MlpBlock_3/Dense_1',
    )
  ]
  return [
    layer('params/embedding/kernel'),
    *(
      layer(f'params/Transformer/encoderblock_{i}/{name}')
      for i in order or range(blocks)
      for name in names
    ),
    layer('params/head/kernel'),
  ]


TREES = {
  'vit': vit(),
  'mlp': [layer(f'params/Dense_{i}/kernel') for i in range(3)],
  'resnet': [
    layer('params/conv_init/kernel'),
    *(
      layer(f'params/ResNetBlock_{i}/Conv_{j}/kernel')
      for i in range(9)
      for j in range(2)
    ),
  ],
  'scan': [
    layer(f'params/block/{name}/kernel', index=(i,))
    for name in ('Dense_0', 'Dense_1')
    for i in range(5)
  ],
  'experts': [
    layer(f'params/block_{i}/moe/wi', index=(expert,))
    for i in range(3)
    for expert in range(4)
  ],
  'haiku': [
    layer(f'net/~/block_{i}/mlp/~/linear_{j}/w')
    for i in range(4)
    for j in range(2)
  ],
  'nnx': [
    layer(f'blocks/{i}/mlp/{j}/kernel') for i in range(4) for j in (0, 2)
  ],
  'single': [layer('kernel', 1, 1, 1, 1)],
  'unrelated': [layer(name) for name in ('_a/w', '$b$/w', 'c<d/w', 'é' * 60)],
  'many': [
    layer(f'tree/{chr(97 + i % 26)}{"x" * (i // 26)}/w') for i in range(200)
  ],
}

KINDS = {
  'vit': ('query', 'out', 'Dense_0', 'Dense_1', depth.OTHERS),
  'mlp': ('Dense',),
  'resnet': ('Conv_0', 'Conv_1', depth.OTHERS),
  'scan': ('Dense_0', 'Dense_1'),
  # Nothing else tells the kind: what all paths share is not shown.
  'experts': ('block',),
  'haiku': ('linear_0', 'linear_1'),
  'nnx': ('mlp/0', 'mlp/2'),
  'single': ('kernel',),
  'unrelated': (depth.ALL,),
  'many': (depth.ALL,),
}


@pytest.mark.parametrize('tree', TREES)
def test_kinds_and_columns(tree):
  plan = depth.arrange(TREES[tree])
  assert plan.kinds == KINDS[tree]
  assert len(plan.places) == len(TREES[tree])
  assert max(place.x for place in plan.places) < len(plan.ticks)


def test_depth_is_read_from_paths_and_from_stacks():
  assert depth.arrange(vit()).ticks == ('embedding', '0', '1', '2', 'head')
  assert depth.arrange(vit()).axis == 'encoderblock'
  scan = depth.arrange(TREES['scan'])
  assert [place.x for place in scan.places] == [0, 1, 2, 3, 4] * 2
  experts = depth.arrange(TREES['experts'])
  columns = [int(place.x) for place in experts.places]
  assert columns == [0] * 4 + [1] * 4 + [2] * 4
  assert len({place.x for place in experts.places}) == 12


def test_alphabetical_blocks_are_put_in_numeric_order():
  plan = depth.arrange(vit(order=sorted(range(12), key=str)))
  assert plan.ticks[1:-1] == tuple(map(str, range(12)))


def test_shared_ends_keep_a_part_of_every_path():
  assert depth.shared_ends(['a/kernel', 'a/b/kernel']) == (1, 0)
  assert depth.shared_ends(['a/x/w', 'a/y/w', 'a/x/w']) == (1, 1)
  assert depth.shared_ends(['a/b/c']) == (0, 0)


def test_large_numbers_of_kinds_are_pooled():
  layers = [layer(f'b_{i}/{c}/w') for i in range(2) for c in 'abcdefghijkl']
  kinds = depth.arrange(layers).kinds
  assert len(kinds) == len(look.KIND_COLORS)
  assert kinds[-1] == depth.OTHERS


@pytest.mark.parametrize('tree', TREES)
def test_figures_draw_without_a_warning(tree):
  layers = TREES[tree]
  along = plots.utilization_by_depth(layers, sides=tree == 'resnet')
  pictures = [along, plots.spectra(layers, 0.99)]
  for figure in pictures:
    stream = io.BytesIO()
    figure.savefig(stream, format='png', dpi=40)
    assert stream.getvalue().startswith(b'\x89PNG')
  curves = sum(
    len(axes.lines)
    for part in pictures[1].subfigs[1].subfigs
    for axes in part.axes
  )
  panels = 2 * len(depth.arrange(layers).kinds)
  # One curve for inputs and one for outputs, and each panel's dashed line.
  assert curves == 2 * len(layers) + panels
  assert tuple(plots.spectra_by_kind(layers, 0.99)) == KINDS[tree]


def test_depth_figure_shows_each_utilization():
  layers = [
    layer('Dense_0/w', 4, 4, 1, 4),
    layer('Dense_1/w', 4, 4, 4, 2),
  ]
  (axes,) = plots.utilization_by_depth(layers).axes
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.25, 0.5])
  assert axes.lines[-1].get_label() == 'mean 37.5%'


def test_spectra_cross_the_line_at_the_rank():
  spectrum = np.array([90.0, 9.0, 0.9, 0.1])
  x, left = plots._left_out(spectrum, 1e-6)
  np.testing.assert_allclose(x, [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(left[:4], [1, 0.1, 0.01, 0.001])
  long_x, long_left = plots._left_out(0.9 ** np.arange(3000.0), 1e-6)
  assert len(long_x) < 100
  assert long_x[-1] == 1
  assert np.all(np.diff(long_left) <= 0)


def test_spectra_of_zeros_and_full_energy_draw():
  flat = layer('a/w', decay=0.0)
  object.__setattr__(flat, 'spectrum_in', np.zeros(6))
  plots.spectra([flat], 1.0).savefig(io.BytesIO(), format='svg')


def run(share, after, before, **more):
  return dict(
    params=int(1e6 * share), params_fraction=share, test_accuracy=after,
    test_accuracy_before_finetune=before, **more,
  )  # fmt: skip


def test_accuracy_figure_has_both_lines_and_methods():
  runs = [run(1.0, 0.99, None)]
  for method in ('output', 'loss'):
    runs.append(run(0.5, 0.98, 0.9, method=method))
    runs.append(run(0.25, 0.97, 0.7, method=method))
  figure = plots.accuracy_by_size(runs)
  figure.savefig(io.BytesIO(), format='png', dpi=40)
  (axes,) = figure.axes
  labels = axes.get_legend_handles_labels()[1]
  assert labels == [
    'after fine-tuning, output', 'before, output',
    'after fine-tuning, loss', 'before, loss', 'dense 99.00%',
  ]  # fmt: skip
  np.testing.assert_allclose(axes.lines[1].get_ydata(), [0.7, 0.9, 0.99])
  ticks = [text.get_text() for text in axes.get_xticklabels()]
  assert ticks == ['250 k\n25%', '500 k\n50%', '1.00 M\n100%']


def test_accuracy_figure_of_the_dense_model_alone_and_without_before():
  plots.accuracy_by_size([run(1.0, 0.99, 0.99)]).savefig(io.BytesIO())
  figure = plots.accuracy_by_size([run(1.0, 0.9, None), run(0.5, 0.9, None)])
  assert 'before' not in figure.axes[0].get_legend_handles_labels()[1]


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='no layers'):
    plots.utilization_by_depth([])
  with pytest.raises(ValueError, match='no runs'):
    plots.accuracy_by_size([])
  with pytest.raises(ValueError, match=re.escape('(0, 1], got 1.5')):
    plots.spectra(TREES['mlp'], 1.5)
