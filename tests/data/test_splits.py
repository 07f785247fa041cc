"""Data: splits, determinism, formats, and errors at once."""

import base64
import io
import itertools
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import types

import numpy as np
from PIL import Image
import pytest

from utilized_rank.data import augment
from utilized_rank.data import digits
from utilized_rank.data import splits as data
from utilized_rank.data import tfrecord

# TFDS's own modules warn about packages that are none of ours.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')

SLICES = {
  'train': 'train[:80%]',
  'calibration': 'train[80%:]',
  'validation': 'validation',
  'test': 'test',
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  data.load({'name': 'sk_digits', 'data_dir': str(path)})
  return str(path)


def load(data_dir, **options):
  return data.load({'name': 'sk_digits', 'data_dir': data_dir, **options})


def equal(a, b):
  assert a.keys() == b.keys()
  return all(np.array_equal(a[key], b[key]) for key in a)


def take(batches, count):
  return list(itertools.islice(batches, count))


@pytest.mark.quick
def test_digits_split_is_a_partition():
  labels = np.arange(1797) % 10
  splits = digits.split_indices(labels)
  together = np.concatenate(list(splits.values()))
  assert sorted(together) == list(range(1797))
  assert {k: len(v) for k, v in splits.items()} == {
    'train': 1181,
    'calibration': 128,
    'validation': 128,
    'test': 360,
  }
  for indices in splits.values():
    share = np.bincount(labels[indices]) / len(indices)
    np.testing.assert_allclose(share, 0.1, atol=0.02)


def test_digits_are_those_of_sklearn(data_dir):
  from sklearn.datasets import load_digits

  sources = load(data_dir, mean=(0.0,), std=(1.0,))
  images = np.concatenate(
    [b['image'] for s in sources.values() for b in s.epoch(500)]
  )
  labels = np.concatenate(
    [b['label'] for s in sources.values() for b in s.epoch(500)]
  )
  # 0..16 came back exactly, every image once: compare as sorted rows.
  rows = np.rint(images.reshape(len(images), -1) * 16).astype(int)
  rows = np.concatenate([rows, labels[:, None]], axis=1)
  original = load_digits()
  expected = np.concatenate([original.data, original.target[:, None]], axis=1)
  order = np.lexsort(rows.T), np.lexsort(expected.T)
  np.testing.assert_array_equal(rows[order[0]], expected[order[1]])


def test_source_describes_itself(data_dir):
  source = load(data_dir)['test']
  assert (len(source), source.num_classes) == (360, 10)
  assert source.image_shape == (8, 8, 1)


def test_epoch_is_exact_and_ordered(data_dir):
  source = load(data_dir)['test']
  batches = list(source.epoch(128))
  assert [len(b['label']) for b in batches] == [128, 128, 104]
  assert batches[0]['image'].dtype == np.float32
  assert batches[0]['label'].dtype == np.int32
  (whole,) = source.epoch(1000)
  joined = np.concatenate([b['image'] for b in batches])
  np.testing.assert_array_equal(joined, whole['image'])


def test_normalisation(data_dir):
  (raw,) = load(data_dir, mean=(0.0,), std=(1.0,))['test'].epoch(360)
  (scaled,) = load(data_dir, mean=(0.3,), std=(0.5,))['test'].epoch(360)
  assert raw['image'].min() == 0.0
  assert raw['image'].max() == 1.0
  np.testing.assert_allclose(
    scaled['image'], (raw['image'] - 0.3) / 0.5, atol=1e-6
  )


def test_batches_depend_on_seed_and_step_alone(data_dir):
  source = load(data_dir, augment='affine')['train']
  first = take(source.batches(100, seed=1), 30)
  again = take(
    load(data_dir, augment='affine')['train'].batches(100, seed=1), 30
  )
  assert all(map(equal, first, again))
  resumed = take(source.batches(100, seed=1, start_step=17), 13)
  assert all(map(equal, first[17:], resumed))
  (other,) = take(source.batches(100, seed=2), 1)
  assert not equal(first[0], other)


def test_an_epoch_has_every_image_once(data_dir):
  source = load(data_dir)['validation']
  (whole,) = source.epoch(128)
  batches = take(source.batches(48, seed=0), 8)
  images = np.concatenate([b['image'] for b in batches]).reshape(3, 128, -1)
  expected = np.unique(whole['image'].reshape(128, -1), axis=0)
  for epoch in images:
    np.testing.assert_array_equal(np.unique(epoch, axis=0), expected)
  assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize('name', ['affine', 'crop_flip', 'inception'])
def test_augmentations(data_dir, name):
  source = load(data_dir, augment=name, mean=(0.0,), std=(1.0,))['train']
  (plain,) = take(source.batches(64, seed=0, augment=False), 1)
  (changed,) = take(source.batches(64, seed=0), 1)
  np.testing.assert_array_equal(plain['label'], changed['label'])
  assert plain['image'].shape == changed['image'].shape == (64, 8, 8, 1)
  assert not np.array_equal(plain['image'], changed['image'])
  assert 0 <= changed['image'].min() <= changed['image'].max() <= 1


def test_streaming_equals_memory(data_dir):
  options = {'augment': 'affine', 'image_size': 12}
  held = load(data_dir, **options)['train'].batches(32, seed=0)
  streamed = load(data_dir, **options, cache_bytes=0)['train']
  assert all(map(equal, take(held, 3), take(streamed.batches(32, seed=0), 3)))


def test_slices(data_dir):
  sources = load(data_dir, splits=SLICES)
  assert {k: len(v) for k, v in sources.items()} == {
    'train': 945,
    'calibration': 236,
    'validation': 128,
    'test': 360,
  }


def test_tfrecord_without_tensorflow(data_dir, tmp_path):
  """The same payloads in the other container give the same examples."""
  from array_record.python import array_record_module

  old, new = tmp_path / 'old', tmp_path / 'new'
  shutil.copytree(data_dir, old)
  (folder,) = (old / 'sk_digits').iterdir()
  target = new / 'sk_digits' / folder.name
  target.mkdir(parents=True)
  for path in folder.iterdir():
    if '.array_record' in path.name:
      reader = array_record_module.ArrayRecordReader(str(path))
      with (target / path.name.replace('array_record', 'tfrecord')).open(
        'wb'
      ) as file:
        for record in reader.read_all():
          file.write(struct.pack('<QI', len(record), 0) + record + b'\0' * 4)
      reader.close()
    else:
      shutil.copy(path, target)
  info = json.loads((target / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  for split in info['splits']:
    split['filepathTemplate'] = split['filepathTemplate'].replace(
      'array_record', 'tfrecord'
    )
  (target / 'dataset_info.json').write_text(json.dumps(info))

  for a, b in zip(
    load(str(new), splits=SLICES).values(),
    load(data_dir, splits=SLICES).values(),
    strict=True,
  ):
    assert all(
      equal(*pair) for pair in zip(a.epoch(100), b.epoch(100), strict=True)
    )

  import tensorflow_datasets as tfds

  alone = tfds.builder_from_directory(target)
  with pytest.raises((ImportError, NotImplementedError), match='(?i)tensorfl'):
    alone.as_data_source('test')[0]

  (path,) = target.glob('*-test.tfrecord*')
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match='359 whole records.*says 360'):
    next(load(str(new))['test'].epoch(10))


def test_a_format_that_is_not_read(data_dir, tmp_path):
  """Slices of parquet are whole splits in TFDS, see docs/compatibility.md."""
  (source,) = (pathlib.Path(data_dir) / 'sk_digits').iterdir()
  shutil.copytree(source, tmp_path / 'set' / 'sk_digits' / source.name)
  path = tmp_path / 'set' / 'sk_digits' / source.name / 'dataset_info.json'
  path.write_text(path.read_text().replace('array_record', 'parquet'))
  with pytest.raises(ValueError, match='stored as parquet; array_record and'):
    load(str(tmp_path / 'set'))


def test_tfrecord_of_tensorflow(tmp_path):
  """A shard as TFDS 4.9.10 wrote it with TensorFlow 2.21."""
  import tensorflow_datasets as tfds

  shard = base64.b64decode(
    'cQAAAAAAAACcl+dzCm8KXAoFaW1hZ2USUwpRCk+JUE5HDQoaCgAAAA1JSERSAAAAAgAAAAIIA'
    'gAAAP3UmnMAAAAWSURBVAiZY2DQiWjZcIeJg4ODg4MDABjUAscK531zAAAAAElFTkSuQmCCCg'
    '8KBWxhYmVsEgYaBAoCrAIsnosucAAAAAAAAACUKa3NCm4KXAoFaW1hZ2USUwpRCk+JUE5HDQo'
    'aCgAAAA1JSERSAAAAAgAAAAIIAgAAAP3UmnMAAAAWSURBVAiZY2Rg5xMVFWXR0tISFRUFAAZR'
    'ARfPWDzAAAAAAElFTkSuQmCCCg4KBWxhYmVsEgUaAwoBB/RKbsI='
  )
  image = tfds.features.Image(shape=(2, 2, 3))
  label = tfds.features.ClassLabel(num_classes=1000)
  features = tfds.features.FeaturesDict({'image': image, 'label': label})
  path = tmp_path / 'tiny.tfrecord'
  place = types.SimpleNamespace(
    filename=path, skip=0, take=2, examples_in_shard=2
  )
  path.write_bytes(shard)
  records = tfrecord.TfRecords([place], features)
  for label, example in zip([7, 300], records.__getitems__([1, 0])):
    pixels = np.arange(12).reshape(2, 2, 3) * label % 256
    np.testing.assert_array_equal(example['image'], pixels)
    assert example['label'] == label
  path.write_bytes(shard.replace(b'PNG', b'JPG'))
  with pytest.raises(OSError, match='is record 1 of .*tiny'):
    records.__getitems__([1])


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    ({'name': 'cifar10'}, FileNotFoundError, 'cifar10 is not prepared in'),
    ({'name': 'imagenet2012'}, FileNotFoundError, 'is not prepared in'),
    ({'name': 'sk_digist'}, ValueError, "did you mean 'sk_digits'"),
    ({'name': 'sk digits!'}, ValueError, "config.data.name='sk digits!': "),
    ({'nam': 'x'}, ValueError, "unknown key 'nam'.*mean 'name'"),
    ({'augment': 'twist'}, ValueError, 'None or one of affine'),
    ({'mean': (0.1, 0.2)}, ValueError, 'has 2 values.*1 channels'),
    ({'label_key': 'x'}, ValueError, 'features image, label'),
    ({'image_key': 'label'}, ValueError, 'must be an Image'),
    ({'label_key': 'image'}, ValueError, 'must be a ClassLabel'),
    ({'splits': {'train': 'train'}}, ValueError, 'it takes train, calib'),
    ({'splits': {**SLICES, 'test': 'tst'}}, ValueError, "'tst' is none"),
    (
      {'splits': {**SLICES, 'test': 'train[90%:95%]'}},
      ValueError,
      'calibration=.* and config.data.splits.test=.* share 59 images',
    ),
    (
      {'splits': {**SLICES, 'test': 'test[:0]'}},
      ValueError,
      'selects no image',
    ),
  ],
)
def test_errors_come_at_once(data_dir, options, error, message):
  start = time.monotonic()
  with pytest.raises(error, match=message):
    load(data_dir, **options)
  assert time.monotonic() - start < 2


def test_bad_batches(data_dir):
  source = load(data_dir)['test']
  with pytest.raises(ValueError, match='start_step=-1'):
    source.batches(10, seed=0, start_step=-1)
  with pytest.raises(ValueError, match='batch_size=0'):
    source.epoch(0)


def test_no_tensorflow(data_dir):
  code = (
    'import sys\n'
    'import utilized_rank.data.splits as data\n'
    'assert "tensorflow_datasets" not in sys.modules\n'
    f's = data.load(dict(name="sk_digits", data_dir={data_dir!r}))\n'
    'next(s["train"].batches(8, seed=0))\n'
    'assert "tensorflow" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('channels', [1, 3])
def test_decode_gives_the_channels_asked_for(mode, channels):
  colour = Image.new('RGB', (5, 4), (200, 30, 90))
  file = io.BytesIO()
  colour.convert(mode).save(file, 'TIFF')
  image = augment.decode(file.getvalue(), channels)
  assert image.shape == (4, 5, channels)
  if channels == 3 and mode in ('P', 'RGB', 'RGBA', 'CMYK'):
    # The web palette has steps of 51 per channel; CMYK rounds.
    assert np.abs(image[0, 0].astype(int) - (200, 30, 90)).max() <= 26
  with pytest.raises(ValueError, match='channels=2'):
    augment.decode(file.getvalue(), 2)


@pytest.mark.parametrize('shape', [(8, 9, 1), (None, None, 3)])
def test_images_that_are_no_squares_need_a_size(shape):
  config = data.DataConfig(name='x', splits=SLICES)
  with pytest.raises(ValueError, match='set config.data.image_size to bring'):
    data._check_shape(config, shape)
