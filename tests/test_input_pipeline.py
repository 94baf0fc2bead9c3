"""Order, resume, hosts and epochs of the input pipeline.

Every test runs on both regimes: a split in memory, and one read in streams.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn import example_order, example_spec, input_pipeline
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core, tfrecord

N, BATCH = 50, 8
PART = {
  'shuffle_buffer_size': 20,
  'cache_raw': False,
  'cache_final': False,
  'skip_errors': False,
}


@pytest.fixture(params=['in memory', 'streams'])
def options(request):
  return {
    'batch_size': BATCH,
    'max_in_memory_gb': 1.0 if request.param == 'in memory' else 0.0,
    'streams': 64,
    'threads': None,
    'prefetch': 2,
    **PART,
  }


def _noise(features, key):
  """Preprocessing with a random op: a draw from the example's key."""
  return {**features, 'draw': tf.random.stateless_uniform([], key)}


def _train(source, options, *, start=0, steps=5, rows=range(BATCH), seed=1):
  batches = input_pipeline.training(
    [input_pipeline.Part(source, _noise, options)],
    options,
    seed=seed,
    start_step=start,
    rows=list(rows),
  )
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
  # Six files make six streams, with 1, 1, 2, 1, 1 and 2 of the 8 rows.
  ends = [0, 8] if options['max_in_memory_gb'] else [0, 1, 2, 4, 5, 6, 8]
  for first, end in itertools.pairwise(ends):
    # A stream's rows of every batch, and its range of the split.
    mine = ids[:, first:end].reshape(-1)
    examples = range(N * first // 8, N * end // 8)
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
    shards=(tfrecord.Shard(path, 2, 5), tfrecord.Shard(path, 9, 3)),
  )
  ids, _ = _train(source, options, steps=1)
  assert sorted(ids[0]) == [9, 10, 11, 12, 13, 16, 17, 18]


def test_the_permutation_is_uniform():
  """Over many epochs every example comes equally often in every place."""
  n, epochs = 10, 2000
  source = core.from_tensors('ten', {'id': np.arange(n)})
  options = {
    'batch_size': n * epochs,
    'max_in_memory_gb': 1,
    'streams': 64,
    'threads': None,
    'prefetch': 1,
    **PART,
  }
  ids, _ = _train(source, options, steps=1, rows=range(n * epochs))
  columns = ids.reshape(epochs, n).T
  counts = np.stack([np.bincount(column, minlength=n) for column in columns])
  # χ² with (n-1)² degrees of freedom: mean 81, standard deviation 12.7.
  chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
  assert chi_square < 81 + 5 * 12.7


@pytest.mark.parametrize(
  ('shards', 'n', 'batch', 'expected'),
  [
    (1024, 10**6, 4096, 64),
    (1024, 10**6, 50, 50),
    (5, 10**6, 8, 5),
    (8, 9, 8, 4),
    (1, 1, 8, 1),
  ],
)
def test_number_of_streams(shards, n, batch, expected):
  shards = (tfrecord.Shard('', 0, 1),) * shards
  source = core.Source('x', lambda r: r, None, n, shards=shards)
  assert example_order.num_streams(source, 64, batch) == expected


@pytest.mark.parametrize('batch_size', [1, 7, 8, 48, 50, 64])
def test_inference_has_every_example_once(sharded_source, options, batch_size):
  start = input_pipeline.inference(
    sharded_source,
    lambda features, key: features,
    options,
    batch_size=batch_size,
    rows=range(batch_size),
  )
  batches = list(start())
  assert len(batches) == -(-N // batch_size)
  real = [i for b in batches for i in b['id'][b['_mask'] == 1]]
  assert sorted(real) == list(range(N))
  assert all(b['id'].shape == (batch_size,) for b in batches)


def test_inference_is_the_same_on_any_number_of_hosts(sharded_source, options):
  def read(rows):
    start = input_pipeline.inference(
      sharded_source, _noise, options, batch_size=8, rows=rows
    )
    batches = list(start())
    return {k: np.stack([b[k] for b in batches]) for k in batches[0]}

  whole = read(range(8))
  for rows in ([0, 1, 2, 3], [6, 7], [5]):
    part = read(rows)
    for key, value in whole.items():
      np.testing.assert_array_equal(part[key], value[:, rows])


def test_a_split_smaller_than_a_batch(options):
  source = core.get(name='bv:mnist5k', split='test[:3]')
  first = _train(source, options, steps=1)[0][0]
  assert set(first) == {source.lookup(i)['id'].numpy() for i in range(3)}


def _mixed(source, options, *, start=0, steps=6, rows=range(BATCH)):
  """Two data sets, of 50 and 30 examples, the second three times as often."""
  other = core.from_tensors('thirty', {'id': np.arange(1000, 1030)})
  parts = [
    input_pipeline.Part(source, _noise, options, weight=1),
    input_pipeline.Part(other, _noise, options, weight=3),
  ]
  batches = input_pipeline.training(
    parts, options, seed=1, start_step=start, rows=list(rows)
  )
  batches = [next(batches) for _ in range(steps)]
  return tuple(np.stack([b[k] for b in batches]) for k in ('id', 'draw'))


def test_a_mix_has_the_weights_in_every_batch(sharded_source, options):
  ids, draws = _mixed(sharded_source, options, steps=40)
  assert ((ids >= 1000).sum(axis=1) == 6).all()
  assert len(set(draws.flat)) == draws.size
  # The second alone goes through its 30 examples, epoch by epoch.
  epochs = _whole_epochs(ids[ids >= 1000], 30)
  assert all(sorted(epoch) == list(range(1000, 1030)) for epoch in epochs)
  assert {*ids[ids < 1000]} == set(range(50))


def test_a_mix_starts_anywhere_and_on_any_hosts(sharded_source, options):
  whole = _mixed(sharded_source, options, steps=12)
  # Row 0 alone is of one data set: its host has nothing of the other.
  for rows in (range(4), range(4, 8), [0], [1, 7]):
    part = _mixed(sharded_source, options, start=7, steps=5, rows=rows)
    for got, expected in zip(part, whole, strict=True):
      np.testing.assert_array_equal(got, expected[7:, list(rows)])


@pytest.mark.parametrize('weights', [[1], [1, 1], [0.3, 0.7], [5, 1, 2, 9]])
@pytest.mark.parametrize('batch_size', [16, 96, 1000])
def test_rows_of_parts_are_in_proportion_and_spread(weights, batch_size):
  owner = input_pipeline.rows_of_parts(weights, batch_size)
  share = np.asarray(weights) / sum(weights)
  # Of every prefix, so that each host has its share of each data set.
  for number, wanted in enumerate(share):
    given = np.cumsum(owner == number)
    error = given - wanted * np.arange(1, batch_size + 1)
    assert np.abs(error).max() < len(weights)


@pytest.mark.parametrize('weights', [[1, -1], [1, float('nan')], [100, 1]])
def test_weights_that_cannot_be(weights):
  with pytest.raises(ConfigError, match='expected'):
    input_pipeline.rows_of_parts(weights, 8)


def _odd(features):
  return features['id'] % 2 == 1


def test_a_filter_leaves_exact_epochs(sharded_source, options):
  source = input_pipeline.filtered(sharded_source, _odd)
  assert source.num_examples == 25
  ids, _ = _train(source, options, steps=20)
  counts = np.bincount(ids.reshape(-1), minlength=50)
  assert (counts[::2] == 0).all()
  # 160 examples are 6.4 epochs; streams differ in where they are in theirs.
  assert set(counts[1::2]) <= {5, 6, 7, 8}
  resumed, _ = _train(source, options, start=13, steps=7)
  np.testing.assert_array_equal(resumed, ids[13:])
  start = input_pipeline.inference(
    source, _noise, options, batch_size=8, rows=range(8)
  )
  real = [i for b in start() for i in b['id'][b['_mask'] == 1]]
  assert sorted(real) == list(range(1, 50, 2))
  # A filter of what is left, and where an example is found again.
  fewer = input_pipeline.filtered(source, lambda f: f['id'] > 20)
  assert fewer.num_examples == 15
  assert 'record 2 of' in fewer.where(0)  # 21 is the third of its file.
  assert '2.tfrecord' in fewer.where(0)


@pytest.mark.parametrize(
  ('fn', 'message'),
  [
    (lambda f: f['id'] > 99, 'leaves no example'),
    (lambda f: f['id'], 'expected one boolean'),
  ],
)
def test_filter_mistakes(sharded_source, fn, message):
  with pytest.raises(ConfigError, match=message):
    input_pipeline.filtered(sharded_source, fn)


def test_caching_changes_nothing_but_memory(sharded_source, options):
  calls = []

  def preprocess(features, key):
    del key
    count = lambda x: (calls.append(int(x)), x)[1]
    id_ = tf.numpy_function(count, [features['id']], tf.int64)
    return {'id': tf.ensure_shape(id_, []), 'draw': features['id']}

  def train(**changes):
    changed = {**options, **changes}
    batches = input_pipeline.training(
      [input_pipeline.Part(sharded_source, preprocess, changed)],
      changed,
      seed=1,
      start_step=0,
      rows=range(8),
    )
    return np.stack([next(batches)['id'] for _ in range(15)])

  in_memory = train(max_in_memory_gb=1)
  np.testing.assert_array_equal(train(cache_raw=True), in_memory)
  calls.clear()
  np.testing.assert_array_equal(train(cache_final=True), in_memory)
  assert len(calls) < 2 * N  # Once each, and the padding of the last batch.

  calls.clear()
  start = input_pipeline.inference(
    sharded_source,
    preprocess,
    options,
    batch_size=10,
    rows=range(10),
    cache_final=True,
  )
  passes = [np.stack([b['id'] for b in start()]) for _ in range(3)]
  for other in passes[1:]:
    np.testing.assert_array_equal(other, passes[0])
  assert len(calls) < 2 * N


def test_ordered_inference_is_in_the_order_of_the_split(
  sharded_source, options
):
  def read(rows):
    start = input_pipeline.inference(
      sharded_source, _noise, options, batch_size=12, rows=rows, ordered=True
    )
    return np.stack([b['id'] * b['_mask'] for b in start()])

  expected = np.concatenate([np.arange(50), np.zeros(10)]).reshape(5, 12)
  np.testing.assert_array_equal(read(range(12)), expected)
  for rows in ([0, 1, 2], [3, 11]):
    np.testing.assert_array_equal(read(rows), expected[:, rows])


def test_strings_and_ragged_features_stay_on_the_host(sharded_source, options):
  def preprocess(features, key):
    del key
    return {
      'id': features['id'],
      'name': tf.strings.join(['é', tf.strings.as_string(features['id'])]),
      'list': tf.range(features['id'] % 3),
      'bytes': tf.constant(b'\xff\x00'),
    }

  spec = example_spec.make(sharded_source, preprocess)
  assert set(example_spec.batch_shapes(spec, 8)) == {'id'}
  start = input_pipeline.inference(
    sharded_source, preprocess, options, batch_size=8, rows=range(8)
  )
  for batch in start():
    assert batch['name'].dtype == batch['list'].dtype == object
    for i, name, values, raw in zip(
      batch['id'], batch['name'], batch['list'], batch['bytes'], strict=True
    ):
      assert name.decode() == f'é{i}'
      assert values.tolist() == list(range(i % 3))
      assert raw == b'\xff\x00'


def _fails_at(*bad):
  """Preprocessing that no example with one of these ids survives."""

  def preprocess(features, key):
    fine = tf.reduce_all(features['id'] != tf.constant(bad, tf.int64))
    check = tf.debugging.Assert(fine, ['the image is broken'])
    with tf.control_dependencies([check]):
      return _noise({'id': tf.identity(features['id'])}, key)

  return preprocess


def _batches(source, preprocess, options, *, start=0, rows=range(BATCH)):
  return input_pipeline.training(
    [input_pipeline.Part(source, preprocess, options)],
    options,
    seed=1,
    start_step=start,
    rows=list(rows),
  )


def test_an_example_that_fails_is_named(sharded_source, options):
  ids, _ = _train(sharded_source, options, steps=7)
  step = next(i for i, row in enumerate(ids) if 30 in row)
  batches = _batches(sharded_source, _fails_at(30), options)
  for expected in ids[:step]:
    np.testing.assert_array_equal(next(batches)['id'], expected)
  with pytest.raises(core.DataError) as e:
    next(batches)
  # 30 is the third record of the fourth file.
  assert 'numbers, example 30: record 2 of' in str(e.value)
  assert '3.tfrecord: ' in str(e.value)
  assert 'the image is broken' in str(e.value)
  assert 'skip_errors' in str(e.value)

  start = input_pipeline.inference(
    sharded_source, _fails_at(30), options, batch_size=8, rows=range(8)
  )
  with pytest.raises(core.DataError, match='example 30: record 2 of'):
    list(start())


def test_skipped_examples_are_replaced_and_reported(
  sharded_source, options, capsys
):
  bad = (3, 30, 31)
  ids, draws = _train(sharded_source, options, steps=14)
  options = {**options, 'skip_errors': True}
  batches = _batches(sharded_source, _fails_at(*bad), options)
  got = [next(batches) for _ in range(14)]
  got_ids = np.stack([b['id'] for b in got])
  fine = ~np.isin(ids, bad)
  np.testing.assert_array_equal(got_ids[fine], ids[fine])
  assert not np.isin(got_ids, bad).any()
  np.testing.assert_array_equal(np.stack([b['draw'] for b in got])[fine],
                                draws[fine])  # fmt: skip
  assert all(set(b) == {'id', 'draw'} for b in got)
  report = capsys.readouterr().out
  assert report.count('skipped: ') == len(bad)  # Each is named once.
  assert 'example 31: record 3 of' in report

  # The replacement, too, is the same from any start and on any hosts.
  for rows in (range(8), [0, 5], [2, 3, 4]):
    resumed = _batches(
      sharded_source, _fails_at(*bad), options, start=5, rows=rows
    )
    for expected in got_ids[5:]:
      np.testing.assert_array_equal(next(resumed)['id'], expected[list(rows)])


def test_skipped_examples_are_masked_out_of_inference(sharded_source, options):
  start = input_pipeline.inference(
    sharded_source,
    _fails_at(0, 30, 49),
    options,
    batch_size=8,
    rows=range(8),
    skip_errors=True,
  )
  real = [i for b in start() for i in b['id'][b['_mask'] == 1]]
  assert sorted(real) == sorted(set(range(50)) - {0, 30, 49})


def test_where_nothing_can_be_read_skipping_ends(sharded_source, options):
  options = {**options, 'skip_errors': True}
  batches = _batches(sharded_source, _fails_at(*range(50)), options)
  with pytest.raises(core.DataError, match='the image is broken'):
    next(batches)


def _damaged(source, folder, how):
  """A copy of the source whose third file, of 9 records, is damaged."""
  shards = []
  for i, shard in enumerate(source.shards):
    with open(shard.path, 'rb') as file:
      data = bytearray(file.read())
    if i == 2 and how == 'cut':
      data = data[: len(data) // 2]
    if i == 2 and how == 'early end':  # 18 bytes a record: four of nine.
      data = data[: 18 * 4]
    if i == 2 and how == 'flipped bit':
      data[18 * 4 + 13] ^= 1
    path = folder / f'{how}-{i}.tfrecord'
    path.write_bytes(data)
    shards.append(tfrecord.Shard(str(path), shard.skip, shard.take))
  return dataclasses.replace(source, shards=tuple(shards))


@pytest.mark.parametrize('how', ['cut', 'early end', 'flipped bit'])
def test_a_damaged_file_is_named_or_passed_over(
  sharded_source, options, tmp_path, how
):
  source = _damaged(sharded_source, tmp_path, how)
  with pytest.raises(core.DataError) as e:
    _train(source, options, steps=8)
  assert f'{how}-2.tfrecord' in str(e.value)

  # A window holds more than what is damaged, so that there are others.
  options = {**options, 'skip_errors': True, 'shuffle_buffer_size': 60}
  ids, _ = _train(source, options, steps=30)
  # Of records 19 to 27 the first four can be read.
  assert set(ids.reshape(-1)) == set(range(50)) - set(range(23, 28))
  resumed, _ = _train(source, options, start=11, steps=4)
  np.testing.assert_array_equal(resumed, ids[11:15])

  start = input_pipeline.inference(
    source, _noise, options, batch_size=8, rows=range(8), skip_errors=True
  )
  real = [i for b in start() for i in b['id'][b['_mask'] == 1]]
  assert sorted(real) == sorted(set(range(50)) - set(range(23, 28)))


def test_cache_raw_reads_each_file_once(tmp_path, options):
  """Of a source with random access, whose records are paths."""
  paths = [str(tmp_path / f'{i}.txt') for i in range(20)]
  for i, path in enumerate(paths):
    pathlib.Path(path).write_text(str(i))
  source = core.from_tensors('files', {'path': paths})
  source = dataclasses.replace(
    source,
    parse=lambda r: {
      'id': tf.strings.to_number(tf.io.read_file(r['path']), tf.int64),
      'list': tf.repeat(r['path'], tf.strings.length(r['path']) % 2 + 1),
    },
  )
  expected, _ = _train(source, options, steps=5)
  batches = _batches(source, _noise, {**options, 'cache_raw': True})
  np.testing.assert_array_equal(next(batches)['id'], expected[0])
  for file in tmp_path.iterdir():
    file.unlink()
  for row in expected[1:]:
    batch = next(batches)
    np.testing.assert_array_equal(batch['id'], row)
    for i, values in zip(batch['id'], batch['list'], strict=True):
      assert set(values) == {paths[i].encode()}
