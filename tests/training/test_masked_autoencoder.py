"""The masked autoencoder against the paper's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.models.vit import ViT
from utilized_rank.training import masked_autoencoder
from utilized_rank.training import train

pytestmark = pytest.mark.slow

SHAPE = (8, 12, 2)
MODEL = ViT(
  num_classes=3,
  patch_size=4,
  width=16,
  depth=2,
  heads=2,
  mlp_dim=24,
  pool='gap',
)
DECODER = masked_autoencoder.decoder_of(MODEL, SHAPE, width=8, depth=1, heads=2)


@pytest.fixture(scope='module')
def images():
  return jax.random.normal(jax.random.key(1), (5, *SHAPE))


@pytest.fixture(scope='module')
def params(images):
  return masked_autoencoder.init(MODEL, DECODER, jax.random.key(0), images[:1])


def test_patches_are_normalised_and_in_the_embeddings_order(images):
  found = np.asarray(masked_autoencoder.normalized_patches(images, 4))
  x = np.asarray(images, np.float64)
  for row in range(2):
    for column in range(3):
      patch = x[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
      flat = patch.reshape(5, -1)
      mean, std = flat.mean(1, keepdims=True), flat.std(1, keepdims=True)
      # 1e-6 is added to the variance, and the sums are in float32.
      np.testing.assert_allclose(
        found[:, 3 * row + column], (flat - mean) / std, atol=2e-5
      )


@pytest.mark.parametrize('pool', ['gap', 'token'])
def test_the_encoder_is_the_classifiers_own(images, pool):
  model = MODEL.clone(pool=pool)
  variables = model.init(jax.random.key(0), images)
  _, state = model.apply(
    variables,
    images,
    capture_intermediates=lambda module, _: module.name == 'Transformer',
  )
  (whole,) = state['intermediates']['Transformer']['__call__']
  np.testing.assert_array_equal(
    masked_autoencoder.encode(model, variables, images), whole[:, -6:]
  )


def test_hidden_patches_are_not_seen(images, params):
  kept = jnp.tile(jnp.array([[4, 1]]), (5, 1))
  tokens = masked_autoencoder.encode(MODEL, params['encoder'], images, kept)
  assert tokens.shape == (5, 2, 16)
  # Patch 4 is in the second row and column, patch 1 in the first row.
  seen = np.zeros(SHAPE, bool)
  seen[4:, 4:8] = seen[:4, 4:8] = True
  changed = jnp.where(seen, images, images + 3.0)
  np.testing.assert_array_equal(
    masked_autoencoder.encode(MODEL, params['encoder'], changed, kept), tokens
  )
  # Order is that of `kept`.
  swapped = masked_autoencoder.encode(
    MODEL, params['encoder'], images, kept[:, ::-1]
  )
  # Attention sums in another order.
  np.testing.assert_allclose(swapped, tokens[:, ::-1], atol=1e-5)


def test_the_loss_is_that_of_hidden_patches(images, params):
  objective = masked_autoencoder.objective(MODEL, DECODER, masked=0.5)
  rng = jax.random.key(3)
  loss, _ = objective(params, None, {'image': images}, rng)
  order = masked_autoencoder.random_order(rng, 5, 6)
  assert (np.sort(order, axis=1) == np.arange(6)).all()
  kept, hidden = np.asarray(order[:, :3]), np.asarray(order[:, 3:])
  tokens = masked_autoencoder.encode(MODEL, params['encoder'], images, kept)
  predicted = np.asarray(DECODER.apply(params['decoder'], tokens, kept))
  target = np.asarray(
    masked_autoencoder.normalized_patches(images, 4), np.float64
  )
  errors = [
    np.mean((predicted[i, j] - target[i, j]) ** 2)
    for i in range(5)
    for j in hidden[i]
  ]
  np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)


def test_no_gradient_reaches_the_head(images, params):
  objective = masked_autoencoder.objective(MODEL, DECODER)
  grads = jax.grad(
    lambda p: objective(p, None, {'image': images}, jax.random.key(0))[0]
  )(params)
  head = grads['encoder']['params'].pop('head')
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(head))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads['decoder']))


def test_pretraining_lowers_the_loss(images, params):
  batch = {'image': np.asarray(images)}
  objective = masked_autoencoder.objective(MODEL, DECODER)
  trained = train.minimize(
    objective,
    params,
    lambda start: iter(lambda: batch, None),
    train.TrainConfig(steps=30, batch_size=5, learning_rate=1e-2),
  )
  loss = lambda p: float(objective(p, None, batch, jax.random.key(9))[0])
  assert loss(trained) < 0.9 * loss(params)


@pytest.mark.quick
@pytest.mark.parametrize('masked', [0.0, 0.01, 0.99, 1.0])
def test_something_is_hidden_and_something_visible(masked):
  with pytest.raises(ValueError, match='some must be visible and some hidden'):
    masked_autoencoder.objective(MODEL, DECODER, masked=masked)
