"""choice and choice_no_replacement: what they choose, and how often."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn import input_pipeline
from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.builder import get_preprocess_fn

N = 5


def _many(pp, number=3000, size=N):
  """The feature x, of entries 0, 1, …, under `number` keys."""
  preprocess = get_preprocess_fn(pp)
  x = tf.range(size)
  keys = tf.data.Dataset.range(number).map(
    lambda i: preprocess({'x': x, 'y': 10 * x}, tf.stack([i, i * 7 + 1]))
  )
  return list(keys.as_numpy_iterator())


def _chi_square(counts, cells):
  expected = sum(counts.values()) / cells
  seen = sum((c - expected) ** 2 / expected for c in counts.values())
  return seen + (cells - len(counts)) * expected


def _count(values):
  counts = {}
  for value in values:
    counts[value] = counts.get(value, 0) + 1
  return counts


def test_single_is_even_and_the_same_for_all_features():
  chosen = _many('choice(inkey=["x", "y"], outkey=["a", "b"])')
  assert all(c['b'] == 10 * c['a'] and c['a'].shape == () for c in chosen)
  counts = _count(int(c['a']) for c in chosen)
  # χ² with 4 degrees of freedom exceeds 18.5 once in a thousand.
  assert _chi_square(counts, N) < 18.5
  assert chosen[0]['x'].shape == (N,)  # What was read stays.


def test_every_subset_is_as_likely():
  chosen = _many('choice(n=2, key="x")')
  counts = _count(tuple(c['x']) for c in chosen)
  assert set(counts) == set(itertools.combinations(range(N), 2))
  assert _chi_square(counts, 10) < 27.9  # 9 degrees of freedom.


def test_a_pair_draws_the_number():
  chosen = _many('choice(n=(1, 3), key="x")')
  counts = _count(len(c['x']) for c in chosen)
  assert set(counts) == {1, 2, 3}
  assert _chi_square(counts, 3) < 13.9
  assert all(list(c['x']) == sorted(set(c['x'])) for c in chosen)


def test_two_ops_draw_independently():
  chosen = _many('choice(inkey="x", outkey="a")|choice(inkey="x", outkey="b")')
  counts = _count((int(c['a']), int(c['b'])) for c in chosen)
  assert _chi_square(counts, N * N) < 51.2  # 24 degrees of freedom.


def test_shapes_and_fewer_than_asked_for():
  preprocess = get_preprocess_fn('choice(n=3, key="x", fewer_ok=True)')
  key = tf.constant([1, 2])
  for size, want in ((0, 0), (2, 2), (5, 3)):
    assert preprocess({'x': tf.range(size)}, key)['x'].shape == (want,)
  exact = tf.function(get_preprocess_fn('choice(n=2, key="x")').__call__)
  traced = exact.get_concrete_function(
    {'x': tf.TensorSpec([None, 7])}, tf.TensorSpec([2], tf.int64)
  )
  assert traced.structured_outputs['x'].shape == (2, 7)


@pytest.mark.parametrize(
  'pp',
  ['choice(key="x")', 'choice(n=3, key="x")', 'choice_no_replacement("x")'],
)
def test_too_few_entries(pp):
  preprocess = get_preprocess_fn(pp)
  data = tf.data.Dataset.from_tensors(0).map(
    lambda n: preprocess({'x': tf.range(n)}, tf.constant([1, 2]))
  )
  with pytest.raises(tf.errors.InvalidArgumentError, match='too few entries'):
    list(data)


def test_features_of_different_lengths():
  preprocess = get_preprocess_fn('choice(key=["x", "y"])')
  unknown = tf.data.Dataset.from_tensors(3).map(
    lambda n: preprocess(
      {'x': tf.range(n), 'y': tf.range(4)}, tf.constant([1, 2])
    )
  )
  with pytest.raises(tf.errors.InvalidArgumentError, match='as many entries'):
    list(unknown)


def test_no_replacement_goes_through_all_before_it_repeats():
  preprocess = get_preprocess_fn('choice_no_replacement(inkey="x", outkey="a")')
  orders = []
  for index in range(40):
    chosen = [
      int(
        preprocess(
          {'x': tf.range(N)},
          input_pipeline.example_key(
            3, 0, tf.constant(epoch, tf.int64), tf.constant(index, tf.int64)
          ),
        )['a']
      )
      for epoch in range(2 * N)
    ]
    for half in (chosen[:N], chosen[N:]):
      assert sorted(half) == list(range(N))
      orders.append(tuple(half))
  # 80 of 120 orders: about 58 different ones if each is as likely.
  assert len(set(orders)) > 45


def test_no_replacement_on_two_features_is_independent():
  pp = '|'.join(f'choice_no_replacement(inkey="x", outkey="{o}")' for o in 'ab')
  chosen = _many(pp, number=500)
  assert 0.1 < np.mean([c['a'] == c['b'] for c in chosen]) < 0.3


@pytest.mark.parametrize(
  ('pp', 'message'),
  [
    ('choice()', 'expected key='),
    ('choice(inkey="x")', 'outkey is missing'),
    ('choice(key=[])', "expected a feature's name"),
    ('choice(key=3)', "expected a feature's name"),
    ('choice(inkey=["x", "y"], outkey="a")', 'expected as many of both'),
    ('choice(n="two", key="x")', 'expected "single", a number, or a pair'),
    ('choice(n=(3, 1), key="x")', 'expected "single", a number, or a pair'),
  ],
)
def test_mistakes(pp, message):
  with pytest.raises(ConfigError, match='pp op 1') as e:
    get_preprocess_fn(pp)
  assert message in str(e.value)
