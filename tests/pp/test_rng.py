"""The draws of one example."""

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.pp.rng import Rng


def _draws(seed, n=150):
  rng = Rng(seed)
  return np.array([rng.uniform() for _ in range(n)])


@pytest.mark.parametrize('dtype', [tf.int32, tf.int64])
def test_same_seed_same_draws_other_seed_others(dtype):
  a = _draws(tf.constant([1, 2], dtype))
  np.testing.assert_array_equal(a, _draws(tf.constant([1, 2], dtype)))
  for other in ([1, 3], [2, 2], [2, 1]):
    assert np.mean(a == _draws(tf.constant(other, dtype))) < 0.02


def test_draws_differ_past_the_first_chunk():
  # 150 draws are three chunks; floats of 23 bits rarely repeat.
  a = _draws([1, 2])
  assert len(np.unique(a)) == len(a)


@pytest.mark.parametrize('sizes', [(1, 2, 70, 3), (60, 10), (64, 1), (0, 5)])
def test_floats_are_handed_out_once(sizes):
  rng = Rng([1, 2])
  drawn = [rng.floats(n).numpy() for n in sizes]
  assert [len(d) for d in drawn] == list(sizes)
  together = np.concatenate(drawn)
  assert len(np.unique(together)) == sum(sizes)
  assert together.dtype == np.float32
  assert together.min() >= 0 and together.max() < 1


def test_graph_equals_eager():
  graph = tf.function(lambda seed: tf.stack(_uniforms(Rng(seed), 70)))
  seed = tf.constant([5, 6])
  np.testing.assert_array_equal(graph(seed), _draws(seed, 70))


def _uniforms(rng, n):
  return [rng.uniform() for _ in range(n)]


@pytest.fixture(scope='module')
def many():
  """The draws of 20,000 seeds that differ as little as seeds can."""

  def draw(i):
    rng = Rng(tf.stack([7, i]))
    return {
      'uniform': rng.uniform(),
      'range': rng.uniform(-2.0, 3.0),
      'integer': rng.integer(5),
      'tensor': rng.integer(tf.constant(5)),
      'coin': rng.coin(),
      'seed': rng.seed(),
    }

  data = tf.data.Dataset.range(20_000, output_type=tf.int32)
  return next(iter(data.map(draw).batch(20_000).as_numpy_iterator()))


def test_uniform_is_uniform(many):
  u = many['uniform']
  assert u.dtype == np.float32
  assert u.min() >= 0 and u.max() < 1
  # Three standard deviations of a bin's count: √(2000 · 0.9) = 42.
  np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0], 2000, atol=130)
  r = many['range']
  assert -2 <= r.min() < -1.99 and 2.99 < r.max() < 3


def test_draws_of_one_example_are_independent(many):
  names = ('uniform', 'range', 'integer', 'tensor', 'coin')
  table = np.stack([many[n].astype(float) for n in names])
  correlation = np.corrcoef(table) - np.eye(len(names))
  assert np.abs(correlation).max() < 4 / np.sqrt(20_000)


@pytest.mark.parametrize('name', ['integer', 'tensor'])
def test_integer_is_even(many, name):
  assert many[name].dtype == np.int32
  assert set(many[name]) == set(range(5))
  np.testing.assert_allclose(np.bincount(many[name]), 4000, atol=180)


def test_integer_stays_below_n():
  # The largest float that tf.random gives, against the rounding of float32.
  largest = np.float32(1 - 2.0**-23)
  for n in (1, 3, 255, 1000, 999_983, 1 << 23):
    assert int(largest * np.float32(n)) == n - 1 if n > 1 else True


def test_coin_and_seed(many):
  assert many['coin'].dtype == bool
  assert abs(many['coin'].mean() - 0.5) < 0.015
  assert many['seed'].dtype == np.int32 and many['seed'].shape[1] == 2
  assert len(np.unique(many['seed'], axis=0)) == 20_000
