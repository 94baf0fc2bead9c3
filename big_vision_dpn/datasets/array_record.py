"""Records of array_record files by their place: random access, any order."""

import resource
from collections.abc import Callable, Sequence

import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets.tfrecord import Shard


def make_lookup(shards: Sequence[Shard]) -> Callable[[tf.Tensor], tf.Tensor]:
  """A function from an int64 index to the record, for parallel calls.

  Args:
    shards: the files, in order. Each is opened when first read, then stays
      open: reopening it would read its table of places again.

  Raises:
    ConfigError: the package array_record is not installed.
  """
  try:
    from array_record.python import array_record_data_source
  except ImportError as e:
    raise ConfigError(
      f'reading array_record needs a package of that name ({e}): pip install'
      ' array_record, which exists for Linux and macOS; or prepare the data as'
      ' tfrecord'
    ) from e
  _allow_open_files(len(shards))
  records = array_record_data_source.ArrayRecordDataSource(
    [f'{s.path}[{s.skip}:{s.skip + s.take}]' for s in shards]
  )

  def read(index: int) -> bytes:
    try:
      return records[index]
    except (RuntimeError, ValueError, IndexError) as e:
      raise tf.errors.DataLossError(None, None, str(e)) from e

  def lookup(index: tf.Tensor) -> tf.Tensor:
    record = tf.numpy_function(read, [index], tf.string)
    return tf.ensure_shape(record, [])

  return lookup


def _allow_open_files(more: int) -> None:
  """Raises this process's limit, often 1,024 in all, as far as it may."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY:
    wanted = soft + more
    if hard != resource.RLIM_INFINITY:
      wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
