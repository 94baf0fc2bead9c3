"""Which example stands in which row of which batch; nothing is decoded here.

The order is a pure function of (seed, step), and does not depend on how many
hosts share the rows.

A source with random access is permuted whole, anew each epoch: the order of
epoch e is a stateless function of (seed, e).

TFRecord files are cut into streams, ranges of examples, each of which fills
its own rows of every batch. In each epoch a stream reads its shards in its own
seeded order and permutes each window of examples, a stateless function of
(seed, epoch, stream, window). So starting in the middle skips whole shards, and
reads at most one shard and one window that are not used. A host reads the
streams whose rows it holds.

An element is a dict: `index` of the example in its source, int64; `record`,
unless the source has random access; for training `epoch`, int64, for inference
`real`, bool. With `spares`, `spare` holds further elements, stacked, that can
stand in for one that cannot be read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.datasets import tfrecord
from big_vision_dpn.datasets.core import Source

_FOREVER = np.iinfo(np.int64).max
# Of the random keys, so that no two uses draw the same numbers.
_PERMUTE, _SHARDS, _WINDOW = range(3)


def shuffled(
  source: Source,
  *,
  seed: int,
  start_step: int,
  batch_size: int,
  rows: Sequence[int],
  max_streams: int,
  shuffle_buffer_size: int,
  spares: int = 0,
) -> tf.data.Dataset:
  """The elements of some rows of all batches from `start_step` on, forever.

  Args:
    source: the split.
    seed: of the order.
    start_step: the number of batches to start behind.
    batch_size: of the global batch.
    rows: the rows of the global batch to give, ascending.
    max_streams: see `num_streams`.
    shuffle_buffer_size: examples in the windows of all streams together.
    spares: how many further elements come with each.

  Returns:
    Elements, row after row, batch after batch.
  """
  if source.lookup is not None:
    return _permuted(source, seed, start_step, batch_size, rows, spares)
  streams = num_streams(source, max_streams, batch_size)
  window = max(1, shuffle_buffer_size // streams)
  make = _shuffled_stream(source, batch_size, streams, window, seed, spares)
  return _interleaved(make, batch_size, streams, rows, start_step)


def in_order(
  source: Source,
  *,
  batch_size: int,
  rows: Sequence[int],
  max_streams: int,
  skip_errors: bool = False,
) -> tuple[tf.data.Dataset, int]:
  """The elements of some rows of all batches of one pass, then padding.

  With random access, or with max_streams=1, batch after batch is the split in
  its own order; otherwise each stream's rows are a range of it.

  Returns:
    Elements, `real` where they are no padding; and the number of batches.
  """
  n = source.num_examples
  if source.lookup is not None:
    steps = -(-n // batch_size)
    places = np.arange(steps)[:, None] * batch_size + np.asarray(rows)
    elements = tf.data.Dataset.from_tensor_slices(places.reshape(-1)).map(
      lambda place: {'index': tf.minimum(place, n - 1), 'real': place < n}
    )
    return elements, steps
  streams = num_streams(source, max_streams, batch_size)
  ranges = [_range(n, batch_size, streams, v) for v in range(streams)]
  parts = [len(_rows(batch_size, streams, v)) for v in range(streams)]
  steps = max(-(-len(r) // p) for r, p in zip(ranges, parts, strict=True))
  make = _padded_stream(source, batch_size, streams, skip_errors)
  elements = _interleaved(make, batch_size, streams, rows, start_step=0)
  return elements.take(steps * len(rows)), steps


def num_streams(source: Source, most: int, batch_size: int) -> int:
  """Up to `most`, but no more than shards, rows of a batch, or half of n."""
  return max(
    1, min(most, len(source.shards), batch_size, source.num_examples // 2)
  )


def _seed(seed: int, purpose: int, *values: Any) -> tf.Tensor:
  """An int64[2] seed for TensorFlow's stateless random ops."""
  key = tf.constant([seed, purpose], tf.int64)
  for value in values:
    key = tf.random.experimental.stateless_fold_in(key, value)
  return key


def _permutation(n: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  # index_shuffle would need no table, but is far from uniform for n < 1000.
  return tf.random.experimental.stateless_shuffle(
    tf.range(n, dtype=tf.int64), seed
  )


def _permuted(
  source: Source,
  seed: int,
  start_step: int,
  batch_size: int,
  rows: Sequence[int],
  spares: int,
) -> tf.data.Dataset:
  """Each epoch in its own random order."""
  n, start = source.num_examples, start_step * batch_size
  held = tf.constant(np.isin(range(batch_size), rows))

  def one_epoch(epoch):
    order = _permutation(n, _seed(seed, _PERMUTE, epoch))
    places = tf.range(epoch * n, (epoch + 1) * n)
    mine = (places >= start) & tf.gather(held, places % batch_size)
    mine = tf.boolean_mask(places % n, mine)

    def element(place):
      result = {'index': order[place], 'epoch': epoch}
      if spares:
        after = (place + tf.range(1, spares + 1, dtype=tf.int64)) % n
        result['spare'] = {'index': tf.gather(order, after)}
      return result

    return tf.data.Dataset.from_tensor_slices(mine).map(element)

  return tf.data.Dataset.range(start // n, _FOREVER).flat_map(one_epoch)


def _rows(batch_size: int, streams: int, stream: int) -> range:
  """The rows of every batch that a stream fills."""
  first, end = (batch_size * v // streams for v in (stream, stream + 1))
  return range(first, end)


def _range(n: int, batch_size: int, streams: int, stream: int) -> range:
  """The stream's examples, in proportion to its rows: epochs end together."""
  rows = _rows(batch_size, streams, stream)
  return range(n * rows.start // batch_size, n * rows.stop // batch_size)


class _Pieces:
  """The shards of a source, cut where streams begin and end.

  Each piece is a range of examples of one file; `index` is the place of its
  first one in the source, `origin` that of the file's first record, counting
  records that a filter leaves out.
  """

  def __init__(self, source: Source, batch_size: int, streams: int):
    ends = np.cumsum([0, *(s.take for s in source.shards)])
    kept = source.kept
    if kept is not None:  # From records to the examples that are left.
      ends = np.searchsorted(kept, ends)
    self._raw = None if kept is None else tf.constant(kept, tf.int64)
    pieces, lengths = [], []
    for stream in range(streams):
      mine = _range(source.num_examples, batch_size, streams, stream)
      before = len(pieces)
      origin = 0
      for shard, first, end in zip(
        source.shards, ends[:-1], ends[1:], strict=True
      ):
        low, high = max(first, mine.start), min(end, mine.stop)
        if low < high:
          pieces.append((shard.path, low, high - low, origin - shard.skip))
        origin += shard.take
      lengths.append(len(pieces) - before)
    names = ('path', 'index', 'take', 'origin')
    columns = dict(zip(names, zip(*pieces, strict=True), strict=True))
    self._tables = {
      key: tf.RaggedTensor.from_row_lengths(
        list(column) if key == 'path' else np.int64(column), lengths
      )
      for key, column in columns.items()
    }

  def of(self, stream: tf.Tensor) -> dict[str, tf.Tensor]:
    """The stream's pieces, in the order of the source."""
    return {key: table[stream] for key, table in self._tables.items()}

  def read(
    self, piece: dict[str, tf.Tensor], skip_errors: bool
  ) -> tf.data.Dataset:
    """The elements of one piece: `index` and `record`."""
    index, take = piece['index'], piece['take']
    first, keep = index, None
    if self._raw is not None:
      raw = self._raw[index : index + take]
      first = raw[0]
      keep = tf.scatter_nd(
        (raw - first)[:, None],
        tf.ones_like(raw, tf.bool),
        [raw[-1] - first + 1],
      )
    return tf.data.Dataset.zip(
      {
        'index': tf.data.Dataset.range(index, index + take),
        'record': tfrecord.read(
          piece['path'],
          first - piece['origin'],
          take,
          keep=keep,
          skip_errors=skip_errors,
        ),
      }
    )


def _shuffled_stream(
  source: Source,
  batch_size: int,
  streams: int,
  window: int,
  seed: int,
  spares: int,
) -> Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]:
  """(stream, examples done) -> its further elements, forever."""
  pieces = _Pieces(source, batch_size, streams)

  def permute(stream, epoch, number, examples):
    """The elements of one window, which holds them in memory."""
    n = tf.size(examples['index'], tf.int64)
    order = _permutation(n, _seed(seed, _WINDOW, stream, epoch, number))

    def element(place):
      at = lambda i: {key: tf.gather(x, i) for key, x in examples.items()}
      result = {**at(order[place]), 'epoch': epoch}
      if spares:
        after = (place + tf.range(1, spares + 1, dtype=tf.int64)) % n
        result['spare'] = at(tf.gather(order, after))
      return result

    return tf.data.Dataset.range(n).map(element)

  def one_epoch(stream, epoch, done):
    """The epoch's elements behind the first `done`."""
    mine = pieces.of(stream)
    count = tf.size(mine['take'], tf.int64)
    order = _permutation(count, _seed(seed, _SHARDS, stream, epoch))
    mine = {key: tf.gather(value, order) for key, value in mine.items()}
    first_window = done // window
    before = tf.cumsum(mine['take'], exclusive=True)
    unused = tf.clip_by_value(first_window * window - before, 0, mine['take'])
    mine['index'] += unused
    mine['take'] -= unused
    used = mine['take'] > 0
    mine = {key: tf.boolean_mask(value, used) for key, value in mine.items()}
    return (
      tf.data.Dataset.from_tensor_slices(mine)
      .flat_map(lambda piece: pieces.read(piece, bool(spares)))
      .batch(window)
      .prefetch(1)  # The next window is read while one is handed out.
      .enumerate(first_window)
      .flat_map(lambda number, x: permute(stream, epoch, number, x))
      .skip(done - first_window * window)
    )

  def stream_from(stream, done):
    length = tf.reduce_sum(pieces.of(stream)['take'])
    first = done // length
    return tf.data.Dataset.range(first, _FOREVER).flat_map(
      lambda epoch: one_epoch(
        stream, epoch, tf.where(epoch == first, done % length, 0)
      )
    )

  return stream_from


def _padded_stream(
  source: Source, batch_size: int, streams: int, skip_errors: bool
) -> Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]:
  """(stream, 0) -> its elements in order, then padding forever."""
  pieces = _Pieces(source, batch_size, streams)

  def stream_from(stream, done):
    del done
    elements = tf.data.Dataset.from_tensor_slices(pieces.of(stream)).flat_map(
      lambda piece: pieces.read(piece, skip_errors)
    )
    padding = elements.take(1).repeat()
    return elements.map(lambda e: {**e, 'real': True}).concatenate(
      padding.map(lambda e: {**e, 'real': False})
    )

  return stream_from


def _interleaved(
  stream_from: Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset],
  batch_size: int,
  streams: int,
  rows: Sequence[int],
  start_step: int,
) -> tf.data.Dataset:
  """Some rows of the batches that the streams make up together."""
  all_rows = [_rows(batch_size, streams, v) for v in range(streams)]
  wanted = set(rows)
  mine = [v for v in range(streams) if wanted.intersection(all_rows[v])]
  lengths = [len(r) for r in all_rows]
  starts = tf.constant([start_step * n for n in lengths], tf.int64)
  read = [row for v in mine for row in all_rows[v]]
  # Streams with different numbers of rows take turns by batches of theirs; to
  # make those and take them apart again is a tenth of a millisecond a record.
  equal = len(set(lengths)) == 1

  def blocks(stream):
    elements = stream_from(stream, starts[stream])
    own = tf.constant(lengths, tf.int64)[stream]
    return elements if equal else elements.batch(own)

  elements = tf.data.Dataset.from_tensor_slices(np.int64(mine)).interleave(
    blocks,
    cycle_length=len(mine),
    block_length=lengths[0] if equal else 1,
    # All at once, since each first has to read its window.
    num_parallel_calls=len(mine),
    deterministic=True,
  )
  elements = elements if equal else elements.unbatch()
  if len(read) == len(rows):
    return elements
  # A stream's part of the batch is held by several hosts.
  held = tf.constant(np.isin(read, rows))
  return (
    elements.enumerate()
    .filter(lambda i, _: held[i % len(read)])
    .map(lambda _, element: element)
  )
