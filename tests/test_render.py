"""Text tables line up; the page is complete, escaped and loads nothing."""

from html.parser import HTMLParser
import re

import numpy as np
import pytest

from utilized_rank import render
from utilized_rank import report

MLU = {0.9: 0.123, 0.95: 0.234, 0.99: 0.352, 0.999: 0.611}
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
META = {
  'title': 'Digits <ViT> & co',
  'config': {'steps': 1500, 'note': '</pre><script>alert(1)</script>'},
  'versions': {'jax': '0.10.2', 'flax<': '0.12'},
  'seconds': {'train': 120.34, 'collect': 4.0},
  'centered': False,
  'energy': 0.99,
}


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


class Page(HTMLParser):
  """Collects what the assertions need; raises on tags that do not match."""

  VOID = frozenset(['meta', 'wbr', 'br', 'link', 'img'])

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.ids, self.names, self.text = [], [], [], [], ''
    self.attributes = []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    values = dict(attrs)
    if 'id' in values:
      self.ids.append(values['id'])
    if tag == 'th' and 'title' in values:
      self.names.append(values['title'])
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_layer_table_lines_up_and_fits():
  layers = vit(4)
  lines = render.layer_table(layers).splitlines()
  assert lines[0] == 'layers: params/Transformer/…/kernel'
  head, rule, *rows = lines[1:-2]
  assert len(rows) == len(layers)
  assert set(rule) == {'─'}
  assert max(map(len, lines)) <= 100
  # Columns end where their titles do.
  for title, key in zip(
    (' d_in', ' d_out', ' k_S', ' k_T', ' r '),
    ('d_in', 'd_out', 'k_in', 'k_out', 'rank'),
    strict=True,
  ):
    end = head.index(title) + len(title.rstrip())
    for row, each in zip(rows, layers, strict=True):
      assert row[:end].split()[-1] == str(getattr(each, key))
      assert row[end : end + 1] in (' ', '')
  end = head.index('used') + 4
  assert all(row[end - 1] == '%' for row in rows)
  assert len({row.split()[0] for row in rows}) == len(layers)
  mean = np.mean([each.utilization for each in layers])
  assert lines[-1].startswith(f'mean layer utilization {100 * mean:.1f}%')
  assert '(12 layers, energy 0.99)' in lines[-1]


def test_layer_table_shortens_long_names_and_keeps_them_apart():
  layers = [
    layer(f'params/{"a" * 40}/{"b" * 70}_{i}/{end}/kernel')
    for i in range(3)
    for end in ('query', 'key')
  ]
  rows = render.layer_table(layers).splitlines()[3:-2]
  assert max(map(len, rows)) <= 100
  assert len({row.split()[0] for row in rows}) == len(layers)
  assert all('…' in row for row in rows)


def test_layer_table_of_one_layer_and_of_stacks():
  text = render.layer_table([layer('params/Dense_0/kernel')])
  assert 'params/Dense_0/kernel' in text
  assert '(1 layer, energy 0.99)' in text
  text = render.layer_table([layer('a/b/w', index=(1, i)) for i in range(3)])
  assert all(f'a/b/w[1,{i}] ' in text for i in range(3))


def test_layer_table_of_200_layers():
  layers = [layer(f'params/net_{i}/w') for i in range(200)]
  rows = render.layer_table(layers).splitlines()[3:-2]
  assert [row.split()[0] for row in rows] == [f'net_{i}' for i in range(200)]


@pytest.mark.parametrize(
  ('share', 'bar'),
  [(0, ''), (1e-6, '▏'), (0.5, '█████'), (0.3625, '███▋'), (1, '█' * 10)],
)
def test_bar(share, bar):
  assert render._bar(share) == bar


def test_run_table():
  lines = render.run_table(RUNS).splitlines()
  assert len(lines) == 2 + len(RUNS)
  assert len({len(line) for line in lines}) == 1
  dense, half, quarter = lines[2:]
  assert re.sub(' +', ' ', dense) == (
    'dense 205,322 100% 6.81 M 100% 1.92 ms 100% – 98.61% –'
  )
  assert half.startswith('50% of block kernels, output  108,100   53%')
  assert half.endswith('96.11%    98.33%     −0.28')
  # What is not known is a dash, not a zero and not a crash.
  assert re.sub(' +', ' ', quarter).endswith(
    'kernels 59,300 29% – – – – 87.22% 98.06% −0.55'
  )


def test_no_change_has_a_sign_but_no_minus():
  runs = [RUNS[0], {**RUNS[1], 'test_accuracy': 0.98609999}]
  assert render.run_table(runs).splitlines()[-1].endswith(' +0.00')


def test_html_is_complete_and_escaped():
  layers = [*vit(2), layer('params/<b>x&y"</b>/kernel')]
  text = render.html(layers, MLU, RUNS, META)
  page = Page(text)
  assert page.names == [each.name for each in layers]
  for value in MLU.values():
    assert f'{100 * value:.1f}%' in page.text
  for wanted in ('98.61%', '98.33%', '98.06%', '−0.28', '108,100', '1.31 ms'):
    assert wanted in page.text
  for wanted in ('uncentred', 'energy 0.99', '120.3 s', '0.10.2', '"steps": '):
    assert wanted in page.text
  assert '<title>Digits &lt;ViT&gt; &amp; co</title>' in text
  assert '<b>x' not in text
  assert 'alert(1)</script>' not in text
  assert page.tags.count('script') == 1
  assert page.tags.count('h1') == 1
  assert page.tags.count('svg') == 2 + 4


def test_html_loads_nothing():
  text = render.html(vit(2), MLU, RUNS, META)
  assert '//' not in re.sub(r'<script>.*</script>', '', text, flags=re.DOTALL)
  assert not re.search(r'https?:|@import|url\((?!#)', text)
  page = Page(text)
  links = [v for k, v in page.attributes if k in ('src', 'href', 'srcset')]
  assert all(link.startswith('#') for link in links)
  assert len(page.ids) == len(set(page.ids))
  targets = re.findall(r'url\(#([^)]+)\)', text) + [link[1:] for link in links]
  assert set(targets) <= set(page.ids)


def test_html_follows_light_and_dark():
  text = render.html(vit(2), MLU, RUNS, META)
  assert 'prefers-color-scheme: dark' in text
  pictures = ''.join(re.findall(r'<svg.*?</svg>', text, flags=re.DOTALL))
  assert 'var(--ink)' in pictures
  # Text that does not take the page's colour would vanish in one mode.
  assert '#000000' not in pictures
  styles = re.findall(r'<text style="([^"]*)"', pictures)
  assert styles
  assert all('fill: var(--' in style for style in styles)


@pytest.mark.parametrize('count', [1, 200])
def test_html_without_runs_and_meta(count):
  layers = [layer(f'params/net_{i}/w', d_in=8, d_out=8) for i in range(count)]
  page = Page(render.html(layers, {}))
  assert page.names == [each.name for each in layers]
  assert 'Size and accuracy' not in page.text


def test_html_with_unknown_errors_shows_a_dash():
  one = layer('a/w')
  object.__setattr__(one, 'error_bound', float('nan'))
  assert 'nan%' not in render.html([one], MLU)


def test_bad_input_is_named():
  for function in (render.layer_table, lambda layers: render.html(layers, {})):
    with pytest.raises(ValueError, match='no layers'):
      function([])
  with pytest.raises(ValueError, match='dense model first'):
    render.run_table([])
  bad = {k: v for k, v in RUNS[1].items() if k != 'flops'}
  with pytest.raises(ValueError, match=r"runs\[1\] lacks \['flops'\]"):
    render.html(vit(1), MLU, [RUNS[0], bad])
  with pytest.raises(ValueError, match="unknown keys \\['titel'\\]"):
    render.html(vit(1), MLU, meta={'titel': 'x'})
