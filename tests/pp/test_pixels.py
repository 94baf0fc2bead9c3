"""Ops in NumPy: joined, computed once, and what the ops around them see."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp import registry
from big_vision_dpn.pp.builder import get_preprocess_fn
from big_vision_dpn.pp.pixels import Pixels

SEED = (1, 2)
IMAGE = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)


@pytest.fixture(autouse=True)
def ops(monkeypatch):
  monkeypatch.setattr(registry, 'OPS', dict(registry.OPS))
  register = registry.register

  @register('flip_ud', key='image', pixels=True)
  def flip_ud():
    return lambda image: image.map(np.flipud)

  @register('brighten', random=True, key='image', pixels=True)
  def brighten(most):
    def fn(image, rng):
      def add(x, draw):
        return x + np.uint8(most * draw[0])

      return image.map(add, rng.floats(1))

    return fn

  @register('halves', key='image', pixels=True)
  def halves():
    def fn(image):
      return image.map(
        lambda x: (x / 2)[:, ::2].astype(np.float32),
        shape=(*image.shape[:1], None, *image.shape[2:]),
        dtype=tf.float32,
      )

    return fn

  @register('add_one', key='image')
  def add_one():
    return lambda x: x + tf.constant(1, x.dtype)


def _run(pp, **features):
  return get_preprocess_fn(pp)(features, SEED)


def _calls(pp, shape=(None, None, 3)):
  """How often the traced function enters Python."""
  fn = get_preprocess_fn(pp)
  traced = tf.function(
    lambda x, seed: fn({'image': x}, seed), autograph=False
  ).get_concrete_function(
    tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([2], tf.int64)
  )
  types = [op.type for op in traced.graph.get_operations()]
  return sum(t.startswith(('PyFunc', 'EagerPyFunc')) for t in types)


@pytest.mark.parametrize(
  'pp, calls',
  [
    ('', 0),
    ('resize(7)', 1),
    (
      'resize_small(9)|random_crop(5)|flip_lr|flip_ud|randaug(2)|brighten(3)',
      1,
    ),
    ('flip_ud|copy("image", "b")|flip_lr', 2),
    ('flip_ud|add_one|flip_ud|flip_lr', 2),
    ('flip_ud|value_range', 1),
    ('flip_ud|inception_crop(4)', 2),
    ('resize(7)|inception_crop(4)', 1),
  ],
)
def test_ops_in_a_row_enter_python_once(pp, calls):
  assert _calls(pp) == calls


def test_a_resize_to_the_size_that_is_there_does_nothing():
  assert _calls('resize((7, 9))|resize_small(7)', (7, 9, 3)) == 0


def test_other_ops_see_tensors():
  got = _run('flip_ud|add_one|flip_ud', image=tf.constant(IMAGE))
  np.testing.assert_array_equal(got['image'], IMAGE + 1)
  got = _run('flip_ud|copy("image", "b")|flip_ud', image=tf.constant(IMAGE))
  np.testing.assert_array_equal(got['image'], IMAGE)
  np.testing.assert_array_equal(got['b'], IMAGE[::-1])


def test_draws_and_shapes_of_a_users_op():
  got = _run('brighten(99)|halves', image=tf.constant(IMAGE))['image']
  assert got.shape == (7, 5, 3) and got.dtype == tf.float32
  added = 2 * got.numpy().astype(int)[0, 0, 0]
  twice = _run('brighten(99)|brighten(99)', image=tf.constant(IMAGE))['image']
  assert 0 < added < 99
  assert (twice.numpy()[0, 0, 0] - added) % 256 != added


def test_joined_ops_are_those_ops_one_by_one():
  image = tf.constant(IMAGE)
  pp = 'resize((20, 30), "area")|random_crop(12)|central_crop(9)|flip_lr'
  apart = pp.replace('|', '|copy("image", "image")|')
  for i in range(10):
    one, many = (
      get_preprocess_fn(p)({'image': image}, (i, 3))['image']
      for p in (pp, apart)
    )
    np.testing.assert_array_equal(one, many)


def test_pixels_do_not_change():
  image = Pixels(tf.constant(IMAGE))
  flipped = image.map(np.flipud)
  twice = flipped.map(np.fliplr)
  np.testing.assert_array_equal(image.tensor(), IMAGE)
  np.testing.assert_array_equal(twice.tensor(), IMAGE[::-1, ::-1])
  assert flipped.tensor() is flipped.tensor()
  np.testing.assert_array_equal(flipped.tensor(), IMAGE[::-1])
  np.testing.assert_array_equal(flipped.map(np.flipud).tensor(), IMAGE)


def test_an_image_that_is_not_decoded():
  with pytest.raises(ConfigError, match=r'\(flip_lr\).*put decode before'):
    _run('flip_lr', image=tf.constant(b'...'))


def test_a_wrong_shape_is_an_error():
  image = Pixels(tf.constant(IMAGE)).map(np.flipud, shape=(3, None, 3))
  with pytest.raises(tf.errors.InvalidArgumentError, match=r'\[7,9,3\]'):
    image.tensor()


# An iterator that is alive to the end, with its threads at work.
_EXIT = """
import sys
import numpy as np, tensorflow as tf
from big_vision_dpn.pp.pixels import Pixels
def busy(x):
  for _ in range(5):
    x = np.sort(x, 0)
  return x
data = tf.data.Dataset.range(10**9)
data = data.map(
  lambda i: Pixels(tf.zeros([500, 500, 3]) + tf.cast(i, tf.float32))
  .map(busy).tensor(),
  num_parallel_calls=8,
)
iterator = iter(data.prefetch(8))
next(iterator)
sys.exit(3)
"""


def test_the_process_ends_with_its_own_status():
  done = subprocess.run([sys.executable, '-c', _EXIT], timeout=60)
  assert done.returncode == 3
