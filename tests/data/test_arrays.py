"""Images from .npz files: slices, encodings, and errors at once."""

import io

import numpy as np
from PIL import Image
import pytest

from utilized_rank.data import splits as split_lib

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 6, 6, 3), np.uint8)
LABELS = np.repeat(np.arange(4), 10).astype(np.uint8)
SPLITS = {
  'train': 'train.npz[:50%]',
  'calibration': 'train.npz[20:30]',
  'validation': 'train.npz[75%:]',
  'test': 'test.npz',
}
PLAIN = {'name': 'arrays', 'image_key': 'x', 'label_key': 'y'}
RAW = {**PLAIN, 'mean': (0.0,), 'std': (1 / 255,)}


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('arrays')
  np.savez(path / 'train.npz', x=IMAGES, y=LABELS)
  np.savez(path / 'test.npz', x=IMAGES[:8], y=LABELS[:8])
  files = [png(image) for image in IMAGES]
  offsets = np.cumsum([0, *map(len, files)])
  flat = np.frombuffer(b''.join(files), np.uint8)
  np.savez(path / 'encoded.npz', x=flat, offsets=offsets, y=LABELS)
  np.savez(path / 'grey.npz', x=IMAGES[..., 0], y=LABELS)
  np.savez(path / 'float.npz', x=IMAGES / 255, y=LABELS)
  np.savez(path / 'short.npz', x=IMAGES, y=LABELS[:-1])
  np.savez(path / 'onehot.npz', x=IMAGES, y=np.eye(4)[LABELS])
  return str(path)


def load(folder, splits=SPLITS, **options):
  return split_lib.load(
    {**RAW, 'data_dir': folder, 'splits': splits, **options}
  )


def whole(source):
  (batch,) = source.epoch(len(source))
  return batch


def test_slices_are_a_partition_of_the_file(folder):
  sources = load(folder)
  assert {k: len(v) for k, v in sources.items()} == {
    'train': 20, 'calibration': 10, 'validation': 10, 'test': 8,
  }  # fmt: skip
  parts = [whole(sources[k]) for k in ('train', 'calibration', 'validation')]
  images = np.concatenate([part['image'] for part in parts]).reshape(40, -1)
  labels = np.concatenate([part['label'] for part in parts])
  rows = np.column_stack([np.rint(images).astype(int), labels])
  expected = np.column_stack([IMAGES.reshape(40, -1), LABELS])
  order = lambda x: x[np.lexsort(x.T)]
  np.testing.assert_array_equal(order(rows), order(expected))
  # The file is sorted by class; its slices are not.
  assert all(len(np.unique(part['label'])) >= 3 for part in parts)
  assert sources['train'].num_classes == 4
  assert sources['train'].image_shape == (6, 6, 3)


def test_a_file_keeps_its_order(folder):
  batch = whole(load(folder)['test'])
  # Normalisation by 1/255 in float32 leaves rounding.
  np.testing.assert_allclose(batch['image'], IMAGES[:8], rtol=1e-5)
  np.testing.assert_array_equal(batch['label'], LABELS[:8])


def test_encoded_images_are_the_same(folder):
  splits = {k: v.replace('train.', 'encoded.') for k, v in SPLITS.items()}
  for name, source in load(folder, splits).items():
    plain = whole(load(folder)[name])
    for key, value in whole(source).items():
      np.testing.assert_array_equal(value, plain[key])


def test_grey_images_have_one_channel(folder):
  splits = {k: 'grey.npz' + v[len('train.npz') :] for k, v in SPLITS.items()}
  splits['test'] = 'grey.npz[30:30]'
  with pytest.raises(ValueError, match='selects none of the 40 images'):
    load(folder, splits)
  splits |= {'test': 'grey.npz[30:32]', 'validation': 'grey.npz[32:]'}
  assert load(folder, splits)['test'].image_shape == (6, 6, 1)


def test_preprocessing_decides_size_and_scale(folder):
  options = {**PLAIN, 'data_dir': folder, 'splits': SPLITS, 'image_size': 12}
  source = split_lib.load({**options, 'preprocess': 'clip'})['test']
  one = Image.fromarray(IMAGES[0]).resize((12, 12), Image.Resampling.BICUBIC)
  mean, std = [0.48145466, 0.4578275, 0.40821073], [
    0.26862954, 0.26130258, 0.27577711,
  ]  # fmt: skip
  expected = (np.asarray(one) / 255 - mean) / std
  # float32 of numbers up to 2.
  np.testing.assert_allclose(whole(source)['image'][0], expected, atol=1e-5)
  streamed = split_lib.load({**options, 'preprocess': 'clip', 'cache_bytes': 0})
  np.testing.assert_array_equal(
    whole(streamed['test'])['image'], whole(source)['image']
  )


def test_augmentation_before_preprocessing_that_gives_floats(folder):
  source = load(
    folder, mean=(0.5,), std=(0.5,), preprocess='augreg', augment='crop_flip'
  )['train']
  batch = next(source.batches(16, seed=0))
  assert batch['image'].shape == (16, 6, 6, 3)
  assert np.abs(batch['image']).max() <= 1


def test_grey_images_have_no_colours_to_normalise(folder):
  splits = dict.fromkeys(SPLITS, 'grey.npz')
  for i, name in enumerate(splits):
    splits[name] += f'[{10 * i}:{10 * i + 10}]'
  with pytest.raises(ValueError, match="'clip': its mean has 3 values.*have 1"):
    split_lib.load(
      {**PLAIN, 'data_dir': folder, 'splits': splits, 'preprocess': 'clip'}
    )


@pytest.mark.parametrize(
  ('split', 'options', 'error', 'message'),
  [
    ('none.npz', {}, FileNotFoundError, 'none.npz'),
    ('train.npz[::2]', {}, ValueError, r'FILE.npz\[START:STOP\]'),
    ('train', {}, ValueError, r'FILE.npz\[START:STOP\]'),
    ('train.npz[:5]', {}, ValueError, 'train=.* and .*test=.* share 5 images'),
    ('train.npz', {}, ValueError, 'share 20 images'),
    ('grey.npz', {}, ValueError, 'differ in shape'),
    ('float.npz', {}, ValueError, 'must be uint8'),
    ('short.npz', {}, ValueError, 'each of the 40 images'),
    ('onehot.npz', {}, ValueError, 'each of the 40 images'),
    ('test.npz', {'image_key': 'z'}, ValueError, "has the arrays x, y; 'z'"),
    (
      'test.npz',
      {'preprocess': 'clipp'},
      ValueError,
      "preprocess='clipp'; it is None or one of augreg",
    ),
    (
      'test.npz',
      {'preprocess': 'clip', 'mean': (0.1,)},
      ValueError,
      r'mean=\(0.1,\) and preprocess=.clip., which decides it',
    ),
  ],
)
def test_refusals(folder, split, options, error, message):
  with pytest.raises(error, match=message):
    load(folder, {**SPLITS, 'test': split}, **options)
