"""Mixup and the loss against their formulas, and mistakes in the config."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from big_vision_dpn import config as config_lib
from big_vision_dpn import tasks
from big_vision_dpn.config import ConfigError
from big_vision_dpn.tasks import classification

CLASSES = 3
MODEL = {'width': 16, 'depth': 1, 'num_heads': 2, 'patch_size': 4}


def _config(**fields):
  config = {
    'total_steps': 10,
    'lr': 0.1,
    'num_classes': CLASSES,
    'input': {'data': {'name': 'x'}, 'batch_size': 8},
    'model': MODEL,
    **fields,
  }
  config = ml_collections.ConfigDict(config, type_safe=False)
  return config_lib.resolve(config)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(5, 8, 8, 3)).astype(np.float32),
    'labels': rng.integers(0, 2, (5, CLASSES)).astype(np.float32),
  }


@pytest.fixture(scope='module')
def params(batch):
  """From numpy, since jax takes seconds to compile the initializers."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(tasks.make(_config()).init, jax.random.key(0), batch)
  return jax.tree.map(
    lambda s: 0.3 * rng.normal(size=s.shape).astype(s.dtype), shapes
  )


@pytest.fixture(scope='module')
def logits(batch, params):
  """Of the task's first predict function."""
  logits, out = jax.jit(tasks.make(_config()).predict_fns['predict'])(
    params, batch
  )
  assert logits.shape == (5, CLASSES)
  np.testing.assert_array_equal(out['logits'], logits)
  return logits


@pytest.mark.parametrize('p', [0.2, 5.0])
@pytest.mark.parametrize('seed', range(5))
def test_mixup_is_its_formula(batch, p, seed):
  image, labels = np.float64(batch['image']), np.eye(5, CLASSES)
  mixed_image, mixed_labels = classification.mixup(
    jax.random.key(seed), p, batch['image'], np.float32(labels)
  )
  # The weight, out of one element: x' = a·x₀ + (1 - a)·x₋₁.
  x, neighbour = image[0, 0, 0, 0], image[-1, 0, 0, 0]
  a = (float(mixed_image[0, 0, 0, 0]) - neighbour) / (x - neighbour)
  assert 0.5 - 1e-6 <= a <= 1 + 1e-6
  for i in range(5):
    np.testing.assert_allclose(
      mixed_image[i], a * image[i] + (1 - a) * image[i - 1], atol=1e-5
    )
    np.testing.assert_allclose(
      mixed_labels[i], a * labels[i] + (1 - a) * labels[i - 1], atol=1e-5
    )


@pytest.mark.parametrize('p', [0.2, 2.0])
def test_distribution_of_the_weight_of_mixup(p):
  n = 4000
  x = jnp.float32([1, 0])  # Mixed, the first element is the weight.
  draw = lambda key: classification.mixup(key, p, x)[0][0]
  drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), n))
  beta = np.random.default_rng(0).beta(p, p, 100 * n)
  expected = np.maximum(beta, 1 - beta)
  tolerance = 4 * expected.std() / np.sqrt(n)
  assert abs(np.float64(drawn).mean() - expected.mean()) < tolerance
  # And not the mean alone.
  quantiles = np.linspace(0.1, 0.9, 9)
  np.testing.assert_allclose(
    np.quantile(drawn, quantiles), np.quantile(expected, quantiles), atol=0.02
  )


def _losses(logits, labels, name):
  logits, labels = np.float64(logits), np.float64(labels)
  if name == 'softmax_xent':
    return -(labels * (logits - np.log(np.exp(logits).sum(-1))[:, None])).sum(
      -1
    )
  p = 1 / (1 + np.exp(-logits))
  return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)


@pytest.mark.parametrize('name', ['sigmoid_xent', 'softmax_xent'])
def test_loss_is_the_mean_of_the_examples_losses(batch, params, logits, name):
  task = tasks.make(_config(loss=name))
  expected = _losses(logits, batch['labels'], name)
  assert np.ptp(expected) > 0.01

  losses = jax.jit(task.predict_fns['loss'])(params, batch)
  assert losses.keys() == {'loss'}
  np.testing.assert_allclose(losses['loss'], expected, rtol=1e-5)

  loss, measurements = jax.jit(task.loss)(params, batch, jax.random.key(0))
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
  assert measurements == {'training_loss': loss}


def test_images_and_labels_are_mixed_with_one_weight(batch, params):
  task = tasks.make(_config(mixup={'p': 1.0}))

  @jax.jit
  def loss(params, batch, rng):
    return task.loss(params, task.augment(batch, rng), rng)[0]

  # Other labels under the same key are mixed with the same weight: one weight
  # has to explain the losses of all.
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, (6, 5, CLASSES)).astype(np.float32)
  key = jax.random.key(3)
  actual = [float(loss(params, {**batch, 'labels': y}, key)) for y in labels]

  image = batch['image']
  predict = jax.jit(
    jax.vmap(
      lambda image: task.predict_fns['predict'](params, {'image': image})[0]
    )
  )
  weights = np.linspace(0.5, 1, 101)
  images = np.float32(
    [a * image + (1 - a) * np.roll(image, 1, 0) for a in weights]
  )
  errors = []
  for a, logits in zip(weights, np.asarray(predict(images)), strict=True):
    mixed = [a * y + (1 - a) * np.roll(y, 1, 0) for y in labels]
    expected = [_losses(logits, y, 'sigmoid_xent').mean() for y in mixed]
    errors.append(np.abs(np.subtract(expected, actual)).max())
  # The true weight is within half a step, 0.0025, of one of them.
  assert min(errors) < 1e-3
  assert errors[-1] > 1e-2  # Without mixup it would not be so.
  other = loss(params, batch, jax.random.key(4))
  assert other != loss(params, batch, key)


@pytest.mark.parametrize('mixup', [{}, {'p': 0}])
def test_without_mixup_the_batch_is_left_alone(batch, mixup):
  task = tasks.make(_config(mixup=mixup))
  augmented = task.augment(batch, jax.random.key(0))
  assert augmented.keys() == batch.keys()
  for key, value in augmented.items():
    np.testing.assert_array_equal(value, batch[key])


def test_dropout_is_on_in_training_alone(batch, params, logits):
  task = tasks.make(_config(model={**MODEL, 'dropout': 0.5}))
  loss = jax.jit(lambda *args: task.loss(*args)[0])
  keys = jax.random.split(jax.random.key(0), 2)
  assert loss(params, batch, keys[0]) != loss(params, batch, keys[1])
  predicted, _ = jax.jit(task.predict_fns['predict'])(params, batch)
  np.testing.assert_array_equal(predicted, logits)


@pytest.mark.parametrize(
  ('bias', 'expected'), [(None, 0), (-6.9, -6.9), (0, 0)]
)
def test_init_head_bias(batch, bias, expected):
  task = tasks.make(_config(init_head_bias=bias))
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  # The rest of the parameters is not computed, which would take seconds.
  head = jax.jit(lambda *args: task.init(*args)['head'])(
    jax.random.key(0), batch
  )
  np.testing.assert_array_equal(head['bias'], np.full(3, expected, np.float32))
  np.testing.assert_array_equal(head['kernel'], np.zeros((16, 3)))
  assert shapes.keys() >= {'head', 'Transformer'}


def test_check_takes_what_fits(batch):
  tasks.make(_config()).check(batch)


@pytest.mark.parametrize(
  ('shapes', 'messages'),
  [
    ({'image': ((5, 8, 8, 3), np.uint8)}, ['gives images uint8[8, 8, 3]']),
    ({'image': ((5, 8, 8), np.float32)}, ['gives images float32[8, 8]']),
    ({'labels': ((5, 4), np.float32)}, ['gives labels of shape [4]']),
    ({'labels': ((5,), np.int64)}, ['gives labels of shape []']),
    ({'labels': ((5, 1, 3), np.float32)}, ['gives labels of shape [1, 3]']),
    (
      {'image': ((5, 8, 8, 3), np.uint8), 'labels': ((5,), np.int64)},
      ['gives images', 'expected [3], config.num_classes: use onehot(3, '],
    ),
  ],
)
def test_check_of_a_batch_that_does_not_fit(batch, shapes, messages):
  spec = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))
  for name, (shape, dtype) in shapes.items():
    spec[name] = jax.ShapeDtypeStruct(shape, dtype)
  with pytest.raises(ConfigError) as e:
    tasks.make(_config()).check(spec)
  assert len(e.value.messages) == len(messages)
  for actual, message in zip(e.value.messages, messages, strict=True):
    assert actual.startswith('config.input.pp: ')
    assert message in actual


@pytest.mark.parametrize(
  ('fields', 'messages'),
  [
    ({'num_classes': None}, ['config.num_classes: missing']),
    ({'num_classes': 0}, ['config.num_classes: missing']),
    (
      {'loss': 'sigmoid'},
      ["config.loss: unknown loss 'sigmoid'. Did you mean 'sigmoid_xent'?"],
    ),
    (
      {'mixup': {'q': 0.2}},
      ["config.mixup: unknown argument of mixup 'q'. Choices: p."],
    ),
    ({'mixup': {'p': -1}}, ['config.mixup: p=-1: expected 0 or more']),
    (
      {'model': {'num_classes': 3}},
      ['config.model: num_classes is a field of the config itself'],
    ),
    (
      {'model': {'patch_nrom': 'dual'}},
      [
        "config.model: unknown argument of model vit 'patch_nrom'. Did you mean"
        " 'patch_norm'?"
      ],
    ),
    ({'model': {'variant': 'X/16'}}, ["config.model: unknown variant 'X'"]),
    ({'model_name': 'vitt'}, ["unknown model 'vitt'. Did you mean 'vit'?"]),
    (
      {'task': 'clasification'},
      ["unknown task 'clasification'. Did you mean 'classification'?"],
    ),
    (
      {
        'num_classes': None,
        'loss': 'x',
        'mixup': {'p': -1},
        'model': {'patch_norm': 'dul'},
      },
      ['config.num_classes', 'config.loss', 'config.mixup', 'config.model'],
    ),
  ],
)
def test_mistakes(fields, messages):
  with pytest.raises(ConfigError) as e:
    tasks.make(_config(**fields))
  assert len(e.value.messages) == len(messages)
  for actual, message in zip(e.value.messages, messages, strict=True):
    assert message in actual
