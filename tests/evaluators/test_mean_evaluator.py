"""Means over a split of what a predict function gives, against numpy."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn import chrono, sharding, tasks
from big_vision_dpn import config as config_lib
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core
from big_vision_dpn.evaluators import common

DATA = {'name': 'bv:mnist5k', 'split': 'test[:37]'}
PP = (
  'decode|central_crop(8)|value_range(-1, 1)'
  '|onehot(10, key="label", key_result="labels")'
)


@pytest.fixture(scope='module')
def config():
  return config_lib.resolve(
    ml_collections.ConfigDict(
      {
        'total_steps': 10,
        'lr': 0.1,
        'num_classes': 10,
        'loss': 'softmax_xent',
        'input': {'data': DATA, 'pp': PP, 'batch_size': 16},
        'model': {'width': 16, 'depth': 1, 'num_heads': 2, 'patch_size': 4},
      },
      type_safe=False,
    )
  )


def _evaluator(config, predict_fns, **spec):
  spec = {'data': DATA, 'pp_fn': PP + '|keep("image", "labels")', **spec}
  entry = common.from_config(
    'mean',
    {'log_steps': 1, **spec},
    predict_fns,
    chrono.steps,
    config.input,
    sharding.Layout(),
  )
  return entry.evaluator


def _feature(name):
  source = core.get(**DATA)
  return np.array([source.lookup(i)[name].numpy() for i in range(37)])


def _images():
  """(37, 8, 8, 3) float32, as PP makes them."""
  encoded = _feature('image')
  images = np.stack([tf.io.decode_png(i, 3).numpy() for i in encoded])
  return images[:, 10:18, 10:18] / np.float32(127.5) - 1


def test_mean_of_the_loss_of_the_task(config):
  task = tasks.make(config)
  evaluator = _evaluator(config, task.predict_fns, pred='loss')
  batch = {'image': _images()}
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  evaluator.check(shapes)
  # From numpy, since jax would take seconds to compile the initializers.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.2 * rng.normal(size=s.shape).astype(s.dtype), shapes
  )
  layout = sharding.Layout()
  replicated = jax.device_put(params, layout.replicated)
  actual = dict(evaluator.run(replicated, layout))

  # All images at once, on one device.
  logits = np.float64(jax.jit(task.predict_fns['predict'])(params, batch)[0])
  label = _feature('label')
  log_sum = np.log(np.exp(logits).sum(-1))
  expected = np.mean(log_sum - logits[np.arange(37), label])
  assert actual.keys() == {'loss'}
  np.testing.assert_allclose(actual['loss'], expected, rtol=1e-5)


def test_padding_does_not_count_and_every_metric_is_averaged(config):
  def predict(params, batch):
    brightness = batch['image'].mean(axis=(1, 2, 3)) * params['scale']
    return {
      'brightness': jnp.where(batch['_mask'] > 0, brightness, jnp.nan),
      'label': batch['labels'] @ jnp.arange(10.0),
    }

  evaluator = _evaluator(config, {'predict': predict})
  actual = dict(evaluator.run({'scale': np.float32(3)}, sharding.Layout()))
  expected = {
    'brightness': 3 * _images().mean(dtype=np.float64),
    'label': _feature('label').mean(),
  }
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=1e-5)


@pytest.mark.parametrize(
  ('predict', 'message'),
  [
    # Times the mask they would broadcast, to a wrong mean.
    (
      lambda params, batch: {'x': batch['labels'][:, :1]},
      "'x' has the shape [16, 1]; expected one value an example, [16]",
    ),
    (lambda params, batch: {'x': jnp.float32(0)}, "'x' has the shape []"),
    (
      lambda params, batch: {'x': batch['text']},
      'fails on batches of image [16, 8, 8, 3], labels [16, 10], _mask [16]:'
      " KeyError: 'text'",
    ),
  ],
)
def test_check_of_a_predict_function_that_does_not_fit(
  config, predict, message
):
  with pytest.raises(ConfigError) as e:
    _evaluator(config, {'predict': predict}).check({})
  assert message in str(e.value)


def test_defaults_to_the_function_predict(config):
  with pytest.raises(ConfigError, match="predict function 'predict'"):
    _evaluator(config, {'loss': lambda params, batch: {}})
