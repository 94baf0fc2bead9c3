"""From a source of examples to batches: deterministic, resumable, sharded.

A batch is a pure function of (config, seed, step). Nothing has to be saved to
go on at step n, on the same number of hosts or another.

A split that fits in memory is permuted whole, anew each epoch: the order of
epoch e is a stateless function of (seed, e).

A larger split is cut into `streams`, ranges of equal length, whose number does
not depend on the hosts. In each epoch a stream reads its shards in its own
seeded order and permutes each window of shuffle_buffer_size / streams
examples, a stateless function of (seed, epoch, stream, window). So starting
in the middle skips whole shards and reads at most one shard and one window
that are not used. A global batch is the concatenation of equal parts of every
stream; a host reads the streams whose part of the batch it holds.

Random preprocessing draws from a key of (seed, epoch, example).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, Mistakes
from big_vision_dpn.datasets.core import Features, Shard, Source, spec_of

Preprocess = Callable[[Features, tf.Tensor], Features]

_FOREVER = np.iinfo(np.int64).max
# Of the random keys, so that no two uses draw the same numbers.
_PERMUTE, _SHARDS, _WINDOW = range(3)


def training(
  source: Source,
  preprocess: Preprocess,
  config: Mapping[str, Any],
  *,
  seed: int,
  start_step: int,
  rows: Sequence[int],
) -> tf.data.Dataset:
  """The training batches from step `start_step` (0 is the first) on, forever.

  Args:
    source: the split.
    preprocess: from raw features and an int64[2] key to the final features.
    config: the resolved `config.input`.
    seed: of order and augmentation.
    start_step: the number of batches to start behind.
    rows: the rows of the global batch that this process holds, ascending.

  Returns:
    Batches of len(rows) examples, on this host.
  """
  batch_size = config['batch_size']
  source = hold_in_memory(source, config['max_in_memory_gb'])
  if source.records is not None:
    examples = _permuted(source, seed, start_step, batch_size, rows)
  else:
    streams = num_streams(source, config['streams'], batch_size)
    window = max(1, config['shuffle_buffer_size'] // streams)
    make = _shuffled_stream(source, streams, window, seed)
    examples = _interleaved(make, streams, batch_size, rows, start_step)

  def finish(example):
    key = example_key(seed, example['epoch'], example['index'])
    return preprocess(source.parse(example['record']), key)

  return _batched(examples, finish, len(rows), config)


def inference(
  source: Source,
  preprocess: Preprocess,
  config: Mapping[str, Any],
  *,
  batch_size: int,
  rows: Sequence[int],
) -> tuple[tf.data.Dataset, int]:
  """Every example of a split once, in batches of a fixed size.

  Args:
    source: the split.
    preprocess: as for `training`; its key has seed 0 and epoch 0.
    config: a resolved `config.input`; read are max_in_memory_gb, streams,
      threads and prefetch.
    batch_size: of the global batch.
    rows: the rows of the global batch that this process holds, ascending.

  Returns:
    The batches, the same number on every host, with a float32 `_mask`: 1 for
    an example, 0 for padding; and their number.
  """
  source = hold_in_memory(source, config['max_in_memory_gb'])
  if source.records is not None:
    steps = -(-source.num_examples // batch_size)
    examples = _in_order(source, steps, batch_size, rows)
  else:
    streams = num_streams(source, config['streams'], batch_size)
    longest = -(-source.num_examples // streams)
    steps = -(-longest // (batch_size // streams))
    make = _padded_stream(source, streams)
    examples = _interleaved(make, streams, batch_size, rows, start_step=0)

  def finish(example):
    key = example_key(0, tf.constant(0, tf.int64), example['index'])
    features = preprocess(source.parse(example['record']), key)
    return {**features, '_mask': tf.cast(example['real'], tf.float32)}

  return _batched(examples, finish, len(rows), config).take(steps), steps


def example_spec(
  source: Source, preprocess: Preprocess
) -> dict[str, tf.TensorSpec]:
  """Specs of the preprocessed features of one example; reads no data."""
  key = tf.TensorSpec([2], tf.int64)
  return spec_of(
    lambda record, key: preprocess(source.parse(record), key),
    source.record_spec,
    key,
  )


def example_key(seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
  """The int64[2] key of one example in one epoch, for its random ops."""
  return tf.stack([epoch * 2**32 + seed, index])


def hold_in_memory(source: Source, max_gb: float) -> Source:
  """The source in memory if its raw bytes are at most `max_gb` × 10^9."""
  return source.in_memory() if source.num_bytes <= max_gb * 1e9 else source


def num_streams(source: Source, streams: int, batch_size: int) -> int:
  """The largest number up to `streams` and the shards that divides a batch."""
  most = min(streams, len(source.shards), batch_size)
  return next(n for n in range(most, 0, -1) if batch_size % n == 0)


def _batched(
  examples: tf.data.Dataset,
  finish: Callable[[Any], Features],
  size: int,
  config: Mapping[str, Any],
) -> tf.data.Dataset:
  options = tf.data.Options()
  options.deterministic = True
  if config['threads']:
    options.threading.private_threadpool_size = config['threads']
  return (
    examples.map(finish, num_parallel_calls=tf.data.AUTOTUNE)
    .batch(size, drop_remainder=True)
    .prefetch(config['prefetch'])
    .with_options(options)
  )


def _record(source: Source, index: tf.Tensor) -> Any:
  return tf.nest.map_structure(lambda r: r[index], source.records)


def _permuted(
  source: Source,
  seed: int,
  start_step: int,
  batch_size: int,
  rows: Sequence[int],
) -> tf.data.Dataset:
  """Examples of an in-memory source, each epoch in its own random order."""
  n, start = source.num_examples, start_step * batch_size
  held = tf.constant(np.isin(range(batch_size), rows))

  def one_epoch(epoch):
    # index_shuffle would need no table, but is far from uniform for n < 1000.
    order = tf.random.experimental.stateless_shuffle(
      tf.range(n, dtype=tf.int64), _seed(seed, _PERMUTE, epoch)
    )
    places = tf.range(epoch * n, (epoch + 1) * n)
    mine = (places >= start) & tf.gather(held, places % batch_size)
    order = tf.boolean_mask(order, mine)
    return tf.data.Dataset.from_tensor_slices(order).map(
      lambda index: {
        'epoch': epoch,
        'index': index,
        'record': _record(source, index),
      }
    )

  return tf.data.Dataset.range(start // n, _FOREVER).flat_map(one_epoch)


def _in_order(
  source: Source, steps: int, batch_size: int, rows: Sequence[int]
) -> tf.data.Dataset:
  """Examples of an in-memory source in their order, then padding."""
  n = source.num_examples
  places = np.arange(steps)[:, None] * batch_size + np.asarray(rows)

  def example(place):
    index = tf.minimum(place, n - 1)
    return {
      'index': index,
      'record': _record(source, index),
      'real': place < n,
    }

  return tf.data.Dataset.from_tensor_slices(places.reshape(-1)).map(example)


def _seed(seed: int, purpose: int, *values: Any) -> tf.Tensor:
  """An int64[2] seed for TensorFlow's stateless random ops."""
  key = tf.constant([seed, purpose], tf.int64)
  for value in values:
    key = tf.random.experimental.stateless_fold_in(key, value)
  return key


def _stream_shards(source: Source, streams: int) -> list[list[Shard]]:
  """Cuts the split into ranges whose lengths differ by at most one."""
  ends = [source.num_examples * (v + 1) // streams for v in range(streams)]
  parts: list[list[Shard]] = [[] for _ in range(streams)]
  stream, place = 0, 0
  for shard in source.shards:
    skip, left = shard.skip, shard.take
    while left:
      take = min(left, ends[stream] - place)
      if take:
        parts[stream].append(Shard(shard.path, skip, take))
      skip, left, place = skip + take, left - take, place + take
      if place == ends[stream]:
        stream += 1
  return parts


def _shard_tables(source: Source, streams: int) -> dict[str, tf.RaggedTensor]:
  """The shards of all streams, as tensors that a stream number indexes.

  `index` is the place in the split of a shard's first record.
  """
  parts = _stream_shards(source, streams)
  takes = np.cumsum([0, *(s.take for part in parts for s in part)])
  lengths = [len(part) for part in parts]
  flat = {
    'path': [s.path for part in parts for s in part],
    'skip': np.int64([s.skip for part in parts for s in part]),
    'take': np.int64([s.take for part in parts for s in part]),
    'index': np.int64(takes[:-1]),
  }
  return {
    key: tf.RaggedTensor.from_row_lengths(values, lengths)
    for key, values in flat.items()
  }


def _read(shard: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
  """The records of one shard, with their places in the split."""
  records = tf.data.TFRecordDataset(shard['path'], buffer_size=8 << 20)
  index = tf.data.Dataset.range(shard['index'], shard['index'] + shard['take'])
  return tf.data.Dataset.zip(
    {
      'index': index,
      'record': records.skip(shard['skip']).take(shard['take']),
    }
  )


def _shuffled_stream(
  source: Source, streams: int, window: int, seed: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]:
  """(stream, records done) -> its further records, forever."""
  tables = _shard_tables(source, streams)

  def one_epoch(stream, epoch, done):
    """The epoch's records behind the first `done`."""
    shards = {key: table[stream] for key, table in tables.items()}
    order = tf.random.experimental.stateless_shuffle(
      tf.range(tf.size(shards['take'])), _seed(seed, _SHARDS, stream, epoch)
    )
    shards = {key: tf.gather(value, order) for key, value in shards.items()}
    first_window = done // window
    before = tf.cumsum(shards['take'], exclusive=True)
    unused = tf.clip_by_value(first_window * window - before, 0, shards['take'])
    for key, sign in (('skip', 1), ('index', 1), ('take', -1)):
      shards[key] += sign * unused
    used = shards['take'] > 0
    shards = {k: tf.boolean_mask(v, used) for k, v in shards.items()}

    def permute(number, records):
      size = tf.size(records['index'])
      order = tf.random.experimental.stateless_shuffle(
        tf.range(size), _seed(seed, _WINDOW, stream, epoch, number)
      )
      return tf.nest.map_structure(lambda r: tf.gather(r, order), records)

    return (
      tf.data.Dataset.from_tensor_slices(shards)
      .flat_map(_read)
      .batch(window)
      .enumerate(first_window)
      .map(permute)
      .prefetch(1)
      .unbatch()
      .skip(done - first_window * window)
      .map(lambda example: {**example, 'epoch': epoch})
    )

  def stream_from(stream, done):
    length = tf.reduce_sum(tables['take'][stream])
    first = done // length
    return tf.data.Dataset.range(first, _FOREVER).flat_map(
      lambda epoch: one_epoch(
        stream, epoch, tf.where(epoch == first, done % length, 0)
      )
    )

  return stream_from


def _padded_stream(
  source: Source, streams: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]:
  """(stream, 0) -> its records in order, then padding forever."""
  tables = _shard_tables(source, streams)

  def stream_from(stream, done):
    del done
    shards = {key: table[stream] for key, table in tables.items()}
    records = tf.data.Dataset.from_tensor_slices(shards).flat_map(_read)
    padding = records.take(1).repeat()
    return records.map(lambda e: {**e, 'real': True}).concatenate(
      padding.map(lambda e: {**e, 'real': False})
    )

  return stream_from


def _interleaved(
  stream_from: Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset],
  streams: int,
  batch_size: int,
  rows: Sequence[int],
  start_step: int,
) -> tf.data.Dataset:
  """The host's rows of the batches that the streams make up together."""
  part = batch_size // streams
  mine = sorted({row // part for row in rows})
  read = [stream * part + i for stream in mine for i in range(part)]
  examples = tf.data.Dataset.from_tensor_slices(np.int64(mine)).interleave(
    lambda stream: stream_from(
      stream, tf.constant(start_step * part, tf.int64)
    ),
    cycle_length=len(mine),
    block_length=part,
    num_parallel_calls=tf.data.AUTOTUNE,
    deterministic=True,
  )
  if len(read) == len(rows):
    return examples
  # A stream's part of the batch is held by several hosts.
  held = tf.constant(np.isin(read, rows))
  return (
    examples.enumerate()
    .filter(lambda i, _: held[i % len(read)])
    .map(lambda _, example: example)
  )


def batch_shapes(
  spec: Mapping[str, tf.TensorSpec], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch of examples with the given specs."""
  return {
    key: jax.ShapeDtypeStruct((batch_size, *s.shape), s.dtype.as_numpy_dtype)
    for key, s in spec.items()
  }


def check_example_spec(
  spec: Mapping[str, tf.TensorSpec], needs: Sequence[str]
) -> None:
  """Raises ConfigError unless examples make batches that a device can hold.

  Args:
    spec: of one preprocessed example.
    needs: the features that must be there.
  """
  mistakes = Mistakes()
  for name in needs:
    with mistakes.of(''):
      if name not in spec:
        raise ConfigError(
          f'gives {", ".join(map(repr, spec)) or "nothing"}, but {name!r} is'
          ' needed; let it make and keep it'
        )
  for name, feature in spec.items():
    with mistakes.of(''):
      if feature.dtype == tf.string:
        raise ConfigError(
          f'leaves {name!r} as a string, which no device can hold; end it with'
          f' |keep({", ".join(map(repr, needs))})'
        )
      if not feature.shape.is_fully_defined():
        raise ConfigError(
          f'leaves {name!r} with the shape {feature.shape}, so that examples'
          ' differ; add e.g. resize(224) or central_crop(224)'
        )
  mistakes.check()
