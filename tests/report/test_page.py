"""The page is complete, escaped and loads nothing."""

from html.parser import HTMLParser
import re
import sys

import pytest
from reports import RUNS
from reports import layer
from reports import vit

from utilized_rank.report import page
from utilized_rank.report import report

pytestmark = pytest.mark.slow

MLU = {0.9: 0.123, 0.95: 0.234, 0.99: 0.352, 0.999: 0.611}
META = {
  'title': 'Digits <ViT> & co',
  'config': {'steps': 1500, 'note': '</pre><script>alert(1)</script>'},
  'versions': {'jax': '0.10.2', 'flax<': '0.12'},
  'seconds': {'train': 120.34, 'collect': 4.0},
  'centered': False,
  'energy': 0.99,
}


class Page(HTMLParser):
  """Collects what the assertions need; raises on tags that do not match."""

  VOID = frozenset(['meta', 'wbr', 'br', 'link', 'img', 'input'])

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


def test_html_is_complete_and_escaped():
  layers = [*vit(2), layer('params/<b>x&y"</b>/kernel')]
  text = page.html(layers, MLU, RUNS, META)
  shown = Page(text)
  assert shown.names == [each.name for each in layers]
  for value in MLU.values():
    assert f'{100 * value:.1f}%' in shown.text
  for wanted in ('98.61%', '98.33%', '98.06%', '−0.28', '108,100', '1.31 ms'):
    assert wanted in shown.text
  for wanted in ('uncentred', 'energy 0.99', '120.3 s', '0.10.2', '"steps": '):
    assert wanted in shown.text
  assert '<title>Digits &lt;ViT&gt; &amp; co</title>' in text
  assert '<b>x' not in text
  assert 'alert(1)</script>' not in text
  assert shown.tags.count('script') == 1
  assert shown.tags.count('h1') == 1
  assert shown.tags.count('svg') == 2 + 4


def test_html_loads_nothing():
  text = page.html(vit(2), MLU, RUNS, META)
  assert '//' not in re.sub(r'<script>.*</script>', '', text, flags=re.DOTALL)
  assert not re.search(r'https?:|@import|url\((?!#)', text)
  shown = Page(text)
  links = [v for k, v in shown.attributes if k in ('src', 'href', 'srcset')]
  assert all(link.startswith('#') for link in links)
  assert len(shown.ids) == len(set(shown.ids))
  targets = re.findall(r'url\(#([^)]+)\)', text) + [link[1:] for link in links]
  assert set(targets) <= set(shown.ids)


def test_html_follows_light_and_dark():
  text = page.html(vit(2), MLU, RUNS, META)
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
  shown = Page(page.html(layers, {}))
  assert shown.names == [each.name for each in layers]
  assert 'Size and accuracy' not in shown.text


def test_html_with_unknown_errors_shows_a_dash():
  one = layer('a/w')
  object.__setattr__(one, 'error_bound', float('nan'))
  assert 'nan%' not in page.html([one], MLU)


def test_report_makes_the_page_of_its_own_layers():
  layers = vit(2)
  shown = report.Report(layers, 0.99, centered=True)
  text = shown.html(RUNS, {'title': 'Digits'})
  assert Page(text).names == [each.name for each in layers]
  assert '<title>Digits</title>' in text
  assert ' centred' in text
  (axes,) = shown.plot().axes
  assert axes.get_ylabel() == 'layer utilization'


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='no layers'):
    page.html([], {})
  bad = {k: v for k, v in RUNS[1].items() if k != 'flops'}
  with pytest.raises(ValueError, match=r"runs\[1\] lacks \['flops'\]"):
    page.html(vit(1), MLU, [RUNS[0], bad])
  with pytest.raises(ValueError, match="unknown keys \\['titel'\\]"):
    page.html(vit(1), MLU, meta={'titel': 'x'})


def test_accuracies_have_counts_and_intervals_and_speed_has_no_tile():
  counted = [
    {**run, 'test_correct': round(360 * run['test_accuracy']),
     'test_count': 360, 'latency_batch_size': 64}
    for run in RUNS
  ]  # fmt: skip
  shown = Page(page.html(vit(1), MLU, counted)).text
  assert '355 of 360, ' in shown and '354 of 360, −0.28 points' in shown
  assert '96.8–99.4%' in shown and 'Of 360 test images' in shown
  assert 'speed' not in shown
  assert '64 images a call' in shown
  assert 'interval' not in Page(page.html(vit(1), MLU, RUNS)).text


def test_the_script_of_a_page_without_the_table_does_nothing():
  text = page.document('Empty', '<p></p>')
  assert 'if (!table) return;' in text


def test_a_notebook_gets_the_page_in_a_frame(monkeypatch):
  shown = report.Report(vit(1), 0.99, centered=False)
  framed = shown._repr_html_()
  assert framed.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
  assert repr(shown) == (
    f'<Report of 3 layers: mean layer utilization '
    f'{shown.mean_layer_utilization:.1%} at energy 0.99>'
  )
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  assert shown._repr_html_().startswith('<pre>')
