"""Ranges of records out of TFRecord files, always as many as were asked for."""

import dataclasses
import re
from collections.abc import Sequence

import tensorflow as tf

# What stands for a record that cannot be read. No data set's parser takes it.
UNREADABLE = b''
# What TensorFlow puts around the words of an error.
_AROUND = re.compile(
  r'\{\{.*?\}\}|\[Op:.*|Error in user-defined .*?: |\w+Iterator::\S+: '
)


@dataclasses.dataclass(frozen=True)
class Shard:
  """Records [skip, skip + take) of one TFRecord file."""

  path: str
  skip: int
  take: int


def read(
  path: str | tf.Tensor,
  first: int | tf.Tensor,
  take: int | tf.Tensor,
  *,
  keep: tf.Tensor | None = None,
  skip_errors: bool = False,
) -> tf.data.Dataset:
  """`take` records of a file, from its record `first` on.

  Args:
    path: of the file.
    first: records of the file to leave out.
    take: how many to read.
    keep: bool, for each record from `first` on whether it counts; the others
      are passed over.
    skip_errors: a damaged record and all behind it in its file, among which no
      record can be told from another, come as UNREADABLE. Otherwise they are
      a tf.errors.OpError, and so is a file that ends early.

  Returns:
    Scalar strings, never fewer than `take`.
  """
  records = tf.data.TFRecordDataset(path, buffer_size=8 << 20)
  if skip_errors:
    records = records.ignore_errors()
    # skip() does not see a damaged record, so that what is behind it would be
    # readable or not depending on where one starts.
    records = records.enumerate().filter(lambda i, _: i >= first).map(_second)
    rest = tf.data.Dataset.from_tensors(UNREADABLE).repeat()
  else:
    records = records.skip(first)
    rest = tf.data.Dataset.range(1).map(lambda _: _end_early(path))
  records = records.concatenate(rest)
  if keep is not None:
    records = records.enumerate().filter(lambda i, _: keep[i]).map(_second)
  return records.take(take)


def find_damage(shards: Sequence[Shard]) -> str:
  """What is wrong with the first file that cannot be read; '' if all can."""
  for shard in shards:
    try:
      for _ in read(shard.path, shard.skip, shard.take):
        pass
    except tf.errors.OpError as e:
      return f'{shard.path}: {reason(e)}'
  return ''


def reason(error: tf.errors.OpError) -> str:
  """TensorFlow's message without the nodes and traces around it."""
  line = (error.message or str(error)).strip().partition('\n')[0]
  return _AROUND.sub('', line).strip().rstrip('.')


def _second(_: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
  return record


def _end_early(path: str | tf.Tensor) -> tf.Tensor:
  problem = tf.debugging.Assert(
    False, [path, 'has fewer records than its data set should have']
  )
  with tf.control_dependencies([problem] if problem is not None else []):
    return tf.constant(UNREADABLE)
