"""What one example is made of: found without data, and checked for devices."""

import pytest
import tensorflow as tf

from big_vision_dpn import example_spec
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'labels': tf.TensorSpec([3])}, "'image' is needed"),
    ({'image': tf.TensorSpec([None, 4, 3])}, 'so that examples differ'),
    ({'image': tf.TensorSpec([], tf.string)}, "'image' as a string"),
  ],
)
def test_check(spec, message):
  with pytest.raises(ConfigError) as e:
    example_spec.check(spec, ('image',))
  assert message in str(e.value)


def test_make_and_batch_shapes():
  source = core.from_tensors('x', {'id': [1, 2], 'text': ['a', 'b']})

  def preprocess(features, key):
    noise = tf.random.stateless_uniform([2, 3], key)
    return {**features, 'noise': noise, 'list': tf.range(features['id'])}

  spec = example_spec.make(source, preprocess)
  assert spec.keys() == {'id', 'text', 'noise', 'list'}
  shapes = example_spec.batch_shapes(spec, 5)
  assert {k: (s.shape, str(s.dtype)) for k, s in shapes.items()} == {
    'id': ((5,), 'int32'),
    'noise': ((5, 2, 3), 'float32'),
  }
  example_spec.check(spec, ('id', 'noise'))
  with pytest.raises(ConfigError, match='with the shape'):
    example_spec.check(spec, ('list',))
