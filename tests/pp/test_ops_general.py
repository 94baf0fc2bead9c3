"""value_range, onehot, keep, drop, copy."""

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.builder import get_preprocess_fn


def _run(pp, **features):
  return get_preprocess_fn(pp)(features, None)


IMAGE = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)


def test_value_range_default():
  got = _run('value_range', image=tf.constant(IMAGE))['image']
  assert got.dtype == tf.float32
  # The two ends exactly, the rest to a float32's last bit.
  assert got[0, 0, 0] == -1 and got[-1, -1, 0] == 1
  np.testing.assert_allclose(got, IMAGE / 127.5 - 1, atol=1.2e-7)


@pytest.mark.parametrize(
  'arguments, want',
  [
    ('-1, 1', lambda x: x / 127.5 - 1),
    ('0, 1', lambda x: x / 255),
    ('0, 1, 0, 1', lambda x: x),
    ('-2, 2, 10, 20', lambda x: (x - 10) / 10 * 4 - 2),
    ('-2, 2, 10, 20, True', lambda x: np.clip((x - 10) / 10 * 4 - 2, -2, 2)),
    (
      '0, 1, [0, 50, 100], (255, 60, 200)',
      lambda x: (x - [0, 50, 100]) / np.subtract([255, 60, 200], [0, 50, 100]),
    ),
    ('vmin=1, vmax=0', lambda x: 1 - x / 255),
  ],
)
@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.float32])
def test_value_range(arguments, want, dtype):
  got = _run(
    f'value_range({arguments})', image=tf.constant(IMAGE.astype(dtype))
  )
  np.testing.assert_allclose(
    got['image'], want(IMAGE.astype(float)), rtol=1e-5, atol=1e-7
  )


def test_value_range_of_nothing():
  with pytest.raises(ConfigError, match='in_min and in_max are equal'):
    get_preprocess_fn('value_range(0, 1, 3, 3)')


@pytest.mark.parametrize(
  'labels, arguments, want',
  [
    (2, '', [0, 0, 1, 0]),
    (-1, '', [0, 0, 0, 0]),
    (2, ', on=0.9, off=0.1', [0.1, 0.1, 0.9, 0.1]),
    ([2], '', [0, 0, 1, 0]),
    ([0, 2, 2], '', [1, 0, 1, 0]),
    ([0, -1, 3], '', [1, 0, 0, 1]),
    ([0, 2], ', on=5, off=-1', [5, -1, 5, -1]),
    (np.zeros([0], np.int64), '', [0, 0, 0, 0]),
    ([0, 2], ', multi=False', [[1, 0, 0, 0], [0, 0, 1, 0]]),
    ([[0], [2]], '', [1, 0, 1, 0]),
  ],
)
@pytest.mark.parametrize('dtype', [tf.int32, tf.int64])
def test_onehot(labels, arguments, want, dtype):
  got = _run(f'onehot(4{arguments})', labels=tf.constant(labels, dtype))
  assert got['labels'].dtype == tf.float32
  np.testing.assert_array_equal(got['labels'], np.float32(want))


def test_onehot_keys():
  got = _run('onehot(3, key="label", key_result="labels")', label=1)
  assert got['label'] == 1
  np.testing.assert_array_equal(got['labels'], [0, 1, 0])
  got = _run('onehot(3, "label")', label=1)
  np.testing.assert_array_equal(got['label'], [0, 1, 0])


def test_onehot_shape_is_static():
  fn = get_preprocess_fn('onehot(5)')
  for shape, want in (([], [5]), ([None], [5]), ([7], [5])):
    traced = tf.function(
      lambda x: fn({'labels': x}, None)
    ).get_concrete_function(tf.TensorSpec(shape, tf.int64))
    assert traced.structured_outputs['labels'].shape == want


@pytest.mark.parametrize('labels', [4, [1, 4]])
def test_onehot_of_a_label_outside_of_the_classes(labels):
  data = tf.data.Dataset.from_tensors({'labels': labels})
  data = data.map(lambda x: get_preprocess_fn('onehot(4)')(x, None))
  with pytest.raises(tf.errors.InvalidArgumentError, match='the 4 classes'):
    list(data)


@pytest.mark.parametrize('depth', ['0', '-3', '"a"', '2.5'])
def test_onehot_depth(depth):
  with pytest.raises(ConfigError, match='depth is the number of classes'):
    get_preprocess_fn(f'onehot({depth})')


def test_keep_drop_copy():
  features = {'a': 1, 'b': 2, 'c': 3}
  assert _run('keep("c", "a")', **features) == {'a': 1, 'c': 3}
  assert _run('drop("c", "a")', **features) == {'b': 2}
  assert _run('keep()', **features) == {}
  assert _run('copy("a", "d")', **features) == {**features, 'd': 1}
  assert _run('copy("a", outkey="b")', **features) == {**features, 'b': 1}
