"""Order, resume, hosts and epochs of the input pipeline.

Every test runs on both regimes: a split in memory, and one read in streams.
"""

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn import input_pipeline
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core

N, BATCH = 50, 8


@pytest.fixture(params=['in memory', 'streams'])
def options(request):
  return {
    'batch_size': BATCH,
    'max_in_memory_gb': 1.0 if request.param == 'in memory' else 0.0,
    'streams': 64,
    'shuffle_buffer_size': 20,
    'threads': None,
    'prefetch': 2,
  }


def _noise(features, key):
  """Preprocessing with a random op: a draw from the example's key."""
  return {**features, 'draw': tf.random.stateless_uniform([], key)}


def _train(source, options, *, start=0, steps=5, rows=range(BATCH), seed=1):
  batches = input_pipeline.training(
    source, _noise, options, seed=seed, start_step=start, rows=list(rows)
  ).as_numpy_iterator()
  batches = [next(batches) for _ in range(steps)]
  return (
    np.stack([b['id'] for b in batches]),
    np.stack([b['draw'] for b in batches]),
  )


def test_two_runs_are_equal_and_two_seeds_are_not(sharded_source, options):
  ids, draws = _train(sharded_source, options)
  again = _train(sharded_source, options)
  np.testing.assert_array_equal(ids, again[0])
  np.testing.assert_array_equal(draws, again[1])
  other = _train(sharded_source, options, seed=2)
  assert (ids != other[0]).any()
  assert not set(draws.flat) & set(other[1].flat)


# 50 examples in batches of 8: the epochs end inside steps 7 and 13.
@pytest.mark.parametrize('start', [1, 5, 6, 7, 13, 60])
def test_starting_at_a_step_is_running_through_it(
  sharded_source, options, start
):
  ids, draws = _train(sharded_source, options, steps=start + 4)
  resumed = _train(sharded_source, options, start=start, steps=4)
  np.testing.assert_array_equal(resumed[0], ids[start:])
  np.testing.assert_array_equal(resumed[1], draws[start:])


@pytest.mark.parametrize(
  'hosts',
  [
    [range(4), range(4, 8)],
    [[0, 1], [2, 3], [4, 5], [6, 7]],
    [[i] for i in range(8)],
    [[0, 5], [1, 2, 3, 4, 6, 7]],
  ],
)
def test_hosts_hold_the_rows_of_the_one_global_batch(
  sharded_source, options, hosts
):
  ids, draws = _train(sharded_source, options, start=3)
  for rows in hosts:
    part = _train(sharded_source, options, start=3, rows=rows)
    np.testing.assert_array_equal(part[0], ids[:, list(rows)])
    np.testing.assert_array_equal(part[1], draws[:, list(rows)])


@pytest.mark.parametrize('threads', [1, 3])
def test_threads_and_prefetch_change_nothing(sharded_source, options, threads):
  expected = _train(sharded_source, options)
  other = _train(sharded_source, {**options, 'threads': threads, 'prefetch': 1})
  np.testing.assert_array_equal(other[0], expected[0])


def _whole_epochs(sequence, length):
  return sequence[: len(sequence) // length * length].reshape(-1, length)


def test_each_epoch_has_every_example_once_in_a_new_order(
  sharded_source, options
):
  ids, draws = _train(sharded_source, options, steps=25)
  assert len(set(draws.flat)) == ids.size  # No draw is used twice.
  streams = 1 if options['max_in_memory_gb'] else 4
  part = BATCH // streams
  for v in range(streams):
    # A stream's range of the split, and its part of every batch.
    examples = range(N * v // streams, N * (v + 1) // streams)
    mine = ids[:, v * part : (v + 1) * part].reshape(-1)
    epochs = _whole_epochs(mine, len(examples))
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(examples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_streams_shuffle_shards_and_windows(sharded_source, options):
  options = {**options, 'streams': 1, 'max_in_memory_gb': 0}
  ids, _ = _train(sharded_source, options, steps=25)
  epochs = _whole_epochs(ids.reshape(-1), N)
  file_of = np.repeat(range(6), [7, 12, 9, 11, 3, 8])
  first_files = {tuple(dict.fromkeys(file_of[epoch])) for epoch in epochs}
  assert len(first_files) > 1
  # Within a window of 20 the order is not that of the files.
  assert all((np.diff(epoch[:20]) != 1).mean() > 0.5 for epoch in epochs)


def test_slices_of_shards_are_read(sharded_source, options):
  path = sharded_source.shards[1].path
  source = core.Source(
    name='slice',
    parse=sharded_source.parse,
    record_spec=sharded_source.record_spec,
    num_examples=8,
    num_bytes=800,
    shards=(core.Shard(path, 2, 5), core.Shard(path, 9, 3)),
  )
  ids, _ = _train(source, options, steps=1)
  assert sorted(ids[0]) == [9, 10, 11, 12, 13, 16, 17, 18]


def test_the_permutation_is_uniform():
  """Over many epochs every example comes equally often in every place."""
  n, epochs = 10, 2000
  source = core.Source(
    name='ten',
    parse=lambda r: {'id': r},
    record_spec=tf.TensorSpec([], tf.int64),
    num_examples=n,
    records=tf.range(n, dtype=tf.int64),
  )
  options = {
    'batch_size': n * epochs,
    'max_in_memory_gb': 1,
    'threads': None,
    'prefetch': 1,
  }
  ids, _ = _train(source, options, steps=1, rows=range(n * epochs))
  columns = ids.reshape(epochs, n).T
  counts = np.stack([np.bincount(column, minlength=n) for column in columns])
  # χ² with (n-1)² degrees of freedom: mean 81, standard deviation 12.7.
  chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
  assert chi_square < 81 + 5 * 12.7


@pytest.mark.parametrize(
  ('shards', 'streams', 'batch', 'expected'),
  [(1024, 64, 4096, 64), (1024, 64, 96, 48), (5, 64, 8, 4), (1, 64, 8, 1)],
)
def test_number_of_streams(shards, streams, batch, expected):
  source = core.Source(
    'x', lambda r: r, None, 1, shards=(core.Shard('', 0, 1),) * shards
  )
  assert input_pipeline.num_streams(source, streams, batch) == expected


@pytest.mark.parametrize('batch_size', [1, 7, 8, 48, 50, 64])
def test_inference_has_every_example_once(sharded_source, options, batch_size):
  batches, steps = input_pipeline.inference(
    sharded_source,
    lambda features, key: features,
    options,
    batch_size=batch_size,
    rows=range(batch_size),
  )
  batches = list(batches.as_numpy_iterator())
  assert len(batches) == steps
  real = [i for b in batches for i in b['id'][b['_mask'] == 1]]
  assert sorted(real) == list(range(N))
  assert all(b['id'].shape == (batch_size,) for b in batches)


def test_inference_is_the_same_on_any_number_of_hosts(sharded_source, options):
  def read(rows):
    batches, steps = input_pipeline.inference(
      sharded_source, _noise, options, batch_size=8, rows=rows
    )
    batches = list(batches.as_numpy_iterator())
    assert len(batches) == steps
    return {k: np.stack([b[k] for b in batches]) for k in batches[0]}

  whole = read(range(8))
  for rows in ([0, 1, 2, 3], [6, 7], [5]):
    part = read(rows)
    for key, value in whole.items():
      np.testing.assert_array_equal(part[key], value[:, rows])


def test_a_split_smaller_than_a_batch(options):
  source = core.get(name='mnist5k', split='test[:3]')
  batches = input_pipeline.training(
    source,
    lambda f, key: {'id': f['id']},
    options,
    seed=0,
    start_step=0,
    rows=range(8),
  )
  first = next(batches.as_numpy_iterator())['id']
  assert set(first) == set(source.records['id'].numpy())


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'labels': tf.TensorSpec([3])}, "'image' is needed"),
    ({'image': tf.TensorSpec([None, 4, 3])}, 'so that examples differ'),
    (
      {'image': tf.TensorSpec([4]), 'id': tf.TensorSpec([], tf.string)},
      "leaves 'id' as a string",
    ),
  ],
)
def test_check_example_spec(spec, message):
  with pytest.raises(ConfigError) as e:
    input_pipeline.check_example_spec(spec, ('image',))
  assert message in str(e.value)
