"""Draws `docs/picture.png`: the idea of the library on one network.

  python -m benchmarks.readme_picture

Left, what the first directions of a kernel leave out of the energy of its
weights W, of its inputs' second moment S and of its outputs' T: the median of
all kernels, and the middle half of them as a band. The network is the small ViT
on handwritten digits of `benchmarks/networks`, trained and measured here in
under a minute. Right, what accuracy is left of it without fine-tuning, from
`benchmarks/results/quality_digits_vit.json`.
"""

from __future__ import annotations

import json
import pathlib

import jax
import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import patheffects  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.networks import common  # noqa: E402
from benchmarks.networks import digits_vit  # noqa: E402
from benchmarks.shared import record  # noqa: E402
import utilized_rank as ur  # noqa: E402

PICTURE = pathlib.Path(__file__).parents[2] / 'docs' / 'picture.png'
INK, MUTED, GRID = '#1f2933', '#6b7784', '#dde2e7'
WEIGHTS, INPUTS, OUTPUTS = '#8a8f98', '#3f7fd0', '#e07b2e'
ENERGY = 0.99
AT = np.linspace(0, 1, 193)  # shares of the directions
LEAST = 1e-6  # of what a logarithm can show; rounding of float32 sums
# Method, allocation, and how its line looks and where its name stands.
RECIPES = (
  ('all steps', 'compress', 'ur.compress', '#2a8a5c', 'o', (50.0, 95.5)),
  ('utilized', 'uniform', "the paper's form", '#8266d1', 's', (24.0, 74.0)),
  ('weight', 'uniform', 'SVD of the weights', WEIGHTS, '^', (22.0, 20.0)),
)


def left_out(spectrum: np.ndarray, side: int) -> np.ndarray:
  """Energy behind the first k of `side` directions, at the places `AT`."""
  energy = np.append(0.0, np.cumsum(spectrum)[:side]) / spectrum.sum()
  return np.interp(AT, np.linspace(0, 1, side + 1), 1 - energy)


def energies(network: common.Network) -> dict[str, np.ndarray]:
  """What W, S and T leave out, (kernels, len(AT)) each."""
  (data, _), *_ = network.folds
  size = network.batch_size
  batches = [
    {k: v[i : i + size] for k, v in data.items()}
    for i in range(0, len(data['x']), size)
  ]
  moments = ur.collect(
    network.fn, network.params, batches, select=network.select, progress=False
  )
  report = ur.measure(network.params, moments, energy=ENERGY, progress=False)
  leaves = {
    jax.tree_util.keystr(keys, simple=True, separator='/'): leaf
    for keys, leaf in jax.tree.leaves_with_path(network.params)
  }
  found: dict[str, list[np.ndarray]] = {'W': [], 'S': [], 'T': []}
  for layer in report.layers:
    w = np.asarray(leaves[layer.path], np.float64)
    w = w.reshape(layer.d_in, layer.d_out)
    spectra = {
      'W': np.linalg.svd(w, compute_uv=False) ** 2,
      'S': layer.spectrum_in,
      'T': layer.spectrum_out,
    }
    for name, spectrum in spectra.items():
      found[name].append(left_out(spectrum, min(w.shape)))
  return {name: np.array(rows) for name, rows in found.items()}


def draw_energies(axes: Axes, found: dict[str, np.ndarray]) -> None:
  for name, color, label in (
    ('W', WEIGHTS, 'weights W'),
    ('S', INPUTS, 'inputs, S'),
    ('T', OUTPUTS, 'outputs, T = WᵀSW'),
  ):
    shares = np.maximum(found[name], LEAST)
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75), axis=0)
    axes.fill_between(100 * AT, low, high, color=color, alpha=0.16, lw=0)
    axes.plot(100 * AT, middle, color=color, lw=2.4, label=label)
    reached = 100 * AT[np.argmax(middle <= 1 - ENERGY)]
    axes.plot(reached, 1 - ENERGY, 'o', color=color, ms=7, zorder=4)
    axes.annotate(
      f'{reached:.0f} %', (reached, 1 - ENERGY), (5, 6), color=color,
      textcoords='offset points', fontsize=12, fontweight='bold', zorder=5,
      path_effects=[patheffects.withStroke(linewidth=3, foreground='white')],
    )  # fmt: skip
  axes.axhline(1 - ENERGY, color=MUTED, lw=1, ls=':')
  axes.set(yscale='log', ylim=(7e-4, 1.1), xlim=(0, 101))
  axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:g} %')
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('directions kept, % of min(d, m)')
  axes.set_ylabel('energy that is left out')
  axes.legend(loc='lower left', frameon=False, fontsize=11, labelcolor=INK)
  axes.set_title(
    f'What the first directions leave out, {len(found["W"])} kernels'
  )


def draw_accuracy(axes: Axes, result: dict) -> None:
  dense, *rows = result['rows']
  axes.axhline(100 * dense['accuracy'], color=MUTED, lw=1, ls=':')
  axes.text(14, 100 * dense['accuracy'] + 2, 'dense', color=MUTED, fontsize=11)
  for method, allocation, name, color, marker, place in RECIPES:
    points = [
      (100 * row['kept'], 100 * row['accuracy'])
      for row in rows
      if (row['method'], row['allocation']) == (method, allocation)
    ]
    axes.plot(*zip(*points), color=color, marker=marker, lw=2.4, ms=6)
    axes.text(*place, name, color=color, fontsize=12, fontweight='bold')
  axes.set(ylim=(0, 102), xlim=(13, 77))
  axes.set_xlabel('parameters kept, %')
  axes.set_ylabel('accuracy, %')
  axes.set_title('Accuracy, nothing fine-tuned')


def style(axes: Axes) -> None:
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(MUTED)
  axes.grid(color=GRID, lw=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=11)
  axes.title.set(color=INK, fontsize=13)
  for axis in (axes.xaxis, axes.yaxis):
    axis.label.set(color=INK, fontsize=12)


def main() -> None:
  result = json.loads((record.RESULTS / 'quality_digits_vit.json').read_text())
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4), layout='constrained'
  )
  draw_energies(left, energies(digits_vit.load('')))
  draw_accuracy(right, result)
  style(left)
  style(right)
  PICTURE.parent.mkdir(exist_ok=True)
  figure.savefig(PICTURE, dpi=120, pil_kwargs={'optimize': True})
  print(f'{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB')


if __name__ == '__main__':
  main()
