"""Accuracy and loss against numpy, and what a mistake in a spec gets.

The model is linear, so that numpy can repeat it in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from big_vision_dpn import chrono, sharding
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core
from big_vision_dpn.evaluators import common

MNIST = {'name': 'bv:mnist5k', 'split': 'test[:37]'}
# The crop of 8×8 makes the model small.
PP_IMAGE = 'decode|central_crop(8)|value_range(-1, 1)'
ONEHOT = '|onehot(10, key="label", key_result="labels")'
KEEP = '|keep("image", "labels")'


def _predict(params, batch):
  image = batch['image'].reshape(len(batch['image']), -1)
  return image @ params['w'] + params['b'], {}


PREDICT_FNS = {'predict': _predict, 'features': lambda params, batch: {}}


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  return {
    'w': 0.1 * rng.normal(size=(8 * 8 * 3, 10)).astype(np.float32),
    'b': rng.normal(size=10).astype(np.float32),
  }


def _entry(spec, *, in_memory=True, predict_fns=PREDICT_FNS, name='val'):
  input_config = {
    'batch_size': 16,
    'max_in_memory_gb': 1.0 if in_memory else 0.0,
    'streams': 64,
    'threads': None,
    'prefetch': 2,
  }
  get_steps = functools.partial(chrono.steps, batch_size=16, total_steps=200)
  spec = {
    'type': 'classification',
    'data': MNIST,
    'pp_fn': PP_IMAGE + ONEHOT + KEEP,
    'log_steps': 10,
    **spec,
  }
  spec = {k: v for k, v in spec.items() if v is not None}
  return common.from_config(
    name, spec, predict_fns, get_steps, input_config, sharding.Layout()
  )


def _run(evaluator, params, devices=8):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  layout = sharding.Layout(mesh)
  params = jax.device_put(params, layout.replicated)
  return dict(evaluator.run(params, layout))


def _expected(images, labels, params, loss):
  """The metrics by their formulas in float64, example by example."""
  precisions, all_losses = [], []
  for image, label in zip(images, labels, strict=True):
    if not label.any():
      continue
    edge = (len(image) - 8) // 2
    x = np.float64(image)[edge : edge + 8, edge : edge + 8] / 127.5 - 1
    logits = x.reshape(-1) @ np.float64(params['w']) + params['b']
    if loss == 'softmax_xent':
      terms = -label * (logits - np.log(np.exp(logits).sum()))
    else:
      p = 1 / (1 + np.exp(-logits))
      terms = -label * np.log(p) - (1 - label) * np.log(1 - p)
    precisions.append(label[logits.argmax()] > 0)
    all_losses.append(terms.sum())
  return {'prec@1': np.mean(precisions), 'loss': np.mean(all_losses)}


def _assert_close(actual, expected):
  assert actual.keys() == expected.keys()
  # A share of the examples: one of them more or less would be far off.
  np.testing.assert_allclose(actual['prec@1'], expected['prec@1'], rtol=1e-6)
  np.testing.assert_allclose(actual['loss'], expected['loss'], rtol=1e-5)


@pytest.fixture(scope='module')
def mnist():
  """The 37 images, (28, 28, 3) uint8, and their one-hot labels."""
  source = core.get(**MNIST)
  examples = [source.lookup(i) for i in range(source.num_examples)]
  images = [tf.io.decode_png(e['image'], 3).numpy() for e in examples]
  return images, np.eye(10)[[int(e['label']) for e in examples]]


@pytest.mark.parametrize('batch_size', [8, 16, 40])
def test_metrics_on_any_devices_and_batch_size(mnist, params, batch_size):
  expected = _expected(*mnist, params, 'softmax_xent')
  assert 0 < expected['prec@1'] < 1
  spec = {'batch_size': batch_size, 'loss_name': 'softmax_xent'}
  evaluator = _entry(spec).evaluator
  for devices in (1, 2, 8):
    _assert_close(_run(evaluator, params, devices), expected)


@pytest.mark.parametrize(
  ('in_memory', 'batch_size'), [(True, 16), (False, 8), (False, 40)]
)
def test_metrics_of_a_split_in_memory_and_in_files(
  tiny_cifar10, params, in_memory, batch_size
):
  data = {'name': 'cifar10', 'split': 'test', 'data_dir': tiny_cifar10}
  spec = {'data': data, 'batch_size': batch_size}
  actual = _run(_entry(spec, in_memory=in_memory).evaluator, params)
  images, labels = [], []
  for example in tfds.load('cifar10', split='test', data_dir=tiny_cifar10):
    images.append(example['image'].numpy())
    labels.append(np.eye(10)[example['label'].numpy()])
  assert len(images) == 21
  _assert_close(actual, _expected(images, labels, params, 'sigmoid_xent'))


LABELS = [
  [3],
  [],
  [0, 3, 7],
  [9, 9],
  [-1],  # onehot reads a negative label as none.
  list(range(10)),
  [],
  [1, 2],
  [4],
  [-1, 5],
  [6, 8, 0],
]


@pytest.fixture(scope='module')
def multi_label(tmp_path_factory):
  """A TFDS folder: images with none, one or several labels."""
  folder = str(tmp_path_factory.mktemp('multi_label'))
  rng = np.random.default_rng(1)
  examples = [
    (
      str(i),
      {
        'image': rng.integers(0, 256, (32, 32, 3), np.uint8),
        'label': np.int64(label),
      },
    )
    for i, label in enumerate(LABELS)
  ]
  tfds.dataset_builders.store_as_tfds_dataset(
    name='multi_label',
    version='1.0.0',
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(32, 32, 3)),
        'label': tfds.features.Sequence(np.int64),
      }
    ),
    split_datasets={'test': examples},
    data_dir=folder,
  )
  return folder


def _multi_label(folder):
  """(data of the spec, images, labels as rows of zeros and ones)."""
  data = {'name': 'multi_label', 'split': 'test', 'data_dir': folder}
  images, labels = [], []
  for example in tfds.load('multi_label', split='test', data_dir=folder):
    images.append(example['image'].numpy())
    some = [i for i in example['label'].numpy() if i >= 0]
    labels.append(np.isin(np.arange(10), some).astype(float))
  assert len(images) == len(LABELS)
  return data, images, labels


@pytest.mark.parametrize('in_memory', [True, False])
def test_several_labels_and_none(multi_label, params, in_memory):
  data, images, labels = _multi_label(multi_label)

  def predict(params, batch):
    """With outputs of nan where they must not count."""
    logits, out = _predict(params, batch)
    counts = (batch['_mask'] > 0) & (batch['labels'].max(-1) > 0)
    return jnp.where(counts[:, None], logits, jnp.nan), out

  entry = _entry(
    {'data': data, 'batch_size': 8},
    in_memory=in_memory,
    predict_fns={'predict': predict},
  )
  assert sum(not row.any() for row in labels) == 3
  expected = _expected(images, labels, params, 'sigmoid_xent')
  assert 0 < expected['prec@1'] < 1
  _assert_close(_run(entry.evaluator, params), expected)


def test_a_split_without_any_label(params):
  no_labels = ONEHOT.replace(')', ', on=0.0)')
  evaluator = _entry({'pp_fn': PP_IMAGE + no_labels + KEEP}).evaluator
  metrics = _run(evaluator, params)
  assert metrics.keys() == {'prec@1', 'loss'}
  assert all(np.isnan(value) for value in metrics.values())


def test_each_run_reads_the_whole_split_with_its_own_parameters(mnist, params):
  other = ONEHOT.replace('"labels"', '"other"') + '|keep("image", "other")'
  spec = {'pp_fn': PP_IMAGE + other, 'label_key': 'other'}
  evaluator = _entry(spec).evaluator
  for p in (params, jax.tree.map(lambda x: -x, params), params):
    expected = _expected(*mnist, p, 'sigmoid_xent')
    _assert_close(_run(evaluator, p), expected)
  broken = {**params, 'b': np.float32([np.nan] * 10)}
  assert np.isnan(_run(evaluator, broken)['loss'])  # It is not hidden.


def test_defaults_of_a_spec():
  entry = _entry({'type': None}, name='classification')
  assert (entry.every, entry.prefix) == (10, 'classification/')
  assert entry.evaluator.split.batch_size == 16
  assert [s.num_examples for s in entry.evaluator.sources()] == [37]


def test_fields_of_a_spec():
  entry = _entry(
    {'log_steps': None, 'log_percent': 0.25, 'prefix': 'z/', 'batch_size': 24}
  )
  assert (entry.name, entry.every, entry.prefix) == ('val', 50, 'z/')
  assert entry.evaluator.split.batch_size == 24


@pytest.mark.parametrize(
  ('spec', 'messages'),
  [
    (
      {'type': 'clasification'},
      ["unknown evaluator 'clasification'. Did you mean 'classification'?"],
    ),
    (
      {'pred': 'predictt'},
      ["unknown predict function 'predictt'. Did you mean 'predict'?"],
    ),
    (
      {'lable_key': 'labels'},
      [
        "unknown argument of evaluator classification 'lable_key'. Did you"
        " mean 'label_key'?"
      ],
    ),
    ({'input_config': {}}, ["classification 'input_config'"]),
    ({'loss_name': 'sigmoid'}, ["loss 'sigmoid'. Did you mean 'sigmoid_xent'"]),
    ({'log_steps': None}, ['log_steps: missing']),
    ({'log_epochs': 1}, ['give one of log_steps, log_epochs']),
    (
      {'type': 'means', 'pred': 'logits', 'log_steps': None},
      [
        "type: unknown evaluator 'means'",
        'pred: unknown',
        'log_steps: missing',
      ],
    ),
    ({'data': None}, ['data is missing']),
    (
      {
        'data': {'name': 'bv:mnist5k', 'split': 'tets'},
        'pp_fn': 'decode|flip',
        'batch_size': 12,
      },
      [
        "data: unknown split 'tets'. Did you mean 'test'?",
        "pp_fn: pp op 2 (flip), column 8 of 'decode|flip'",
        'batch_size: 12: expected a multiple of the 8 devices',
      ],
    ),
    (
      {'pp_fn': 'decode' + ONEHOT + '|keep("image")'},
      ['so that examples', "pp_fn: gives 'image', but 'labels' is needed"],
    ),
  ],
)
def test_mistakes(spec, messages):
  with pytest.raises(ConfigError) as e:
    _entry(spec)
  assert len(e.value.messages) == len(messages)
  for actual, message in zip(e.value.messages, messages, strict=True):
    assert message in actual


def test_without_a_task_the_rest_of_a_spec_is_checked():
  with pytest.raises(ConfigError, match='log_steps: missing'):
    _entry({'log_steps': None, 'pred': 'x'}, predict_fns=None)


def _shapes(params):
  return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))


def test_check_takes_shapes(params):
  _entry({}).evaluator.check(_shapes(params))


@pytest.mark.parametrize(
  ('pp_fn', 'message'),
  [
    # Either would broadcast against the ten logits, or fail within jax.
    (ONEHOT.replace('10', '1'), "'labels' of shape [1]; the model has outputs"),
    (ONEHOT.replace('10', '12'), "'labels' of shape [12]; the model has"),
    ('|copy("label", "labels")', "'labels' of shape []; the model has"),
    (ONEHOT + '|central_crop(6)', 'fails on batches of image [16, 6, 6, 3]'),
  ],
)
def test_check_of_shapes_that_do_not_fit(params, pp_fn, message):
  entry = _entry({'pp_fn': PP_IMAGE + pp_fn + KEEP})
  with pytest.raises(ConfigError) as e:
    entry.evaluator.check(_shapes(params))
  assert message in str(e.value)
