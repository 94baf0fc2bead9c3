"""From elements of `example_order` to batches in NumPy; names what fails."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.datasets import tfrecord
from big_vision_dpn.datasets.core import DataError, Features, Source
from big_vision_dpn.writers import note

Batch = dict[str, np.ndarray]

# With skip_errors: the examples that are tried in place of one that fails.
NUM_SPARES = 8
_ADVICE = (
  'Mend it; or, with skip_errors=True, an example that cannot be read is'
  f' reported and left out, if one of {NUM_SPARES} others can take its place'
)
# Skipped examples that are reported by name.
_REPORTED = 100


@dataclasses.dataclass(frozen=True)
class Reader:
  """A data set as one process reads it.

  Attributes:
    source: the split.
    number: of the data set among those of the training data.
    rows: how many rows of a batch this process reads of it.
    elements: batches done -> the elements of `example_order` behind them.
    finish: from an element to its features.
  """

  source: Source
  number: int
  rows: int
  elements: Callable[[int], tf.data.Dataset]
  finish: Callable[[Any], Features]


def spares(reader: Reader) -> Callable[[Any], tf.data.Dataset]:
  """From an element to what can stand in for it, already finished."""

  def spares(element):
    finish = lambda e: {
      **reader.finish({**e, 'epoch': element['epoch']}),
      '_skipped': element['index'] + (reader.number << 48),
    }
    others = tf.data.Dataset.from_tensor_slices(element['spare'])
    # If none can be read either, the element's own error is raised.
    itself = tf.data.Dataset.from_tensors(element)
    return (
      others.map(finish)
      .ignore_errors()
      .concatenate(itself.map(_not_skipped(reader.finish)))
    )

  return spares


def _not_skipped(finish: Callable[[Any], Features]) -> Callable:
  return lambda e: {**finish(e), '_skipped': tf.constant(-1, tf.int64)}


def finished(
  elements: tf.data.Dataset,
  finish: Callable[[Any], Features],
  instead: Callable[[Any], tf.data.Dataset] | None,
) -> tf.data.Dataset:
  """The features of each element, and which one was skipped, or -1.

  Args:
    elements: see `example_order`.
    finish: from an element to its features.
    instead: what to take, the first of it, where `finish` fails; None lets it
      fail.
  """
  finish = _not_skipped(finish)
  if instead is None:
    return elements.map(finish, num_parallel_calls=tf.data.AUTOTUNE)

  def first_success(element):
    own = tf.data.Dataset.from_tensors(element).map(finish).ignore_errors()
    return own.concatenate(instead(element)).take(1)

  return elements.interleave(
    first_success, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
  )


def batched(
  examples: tf.data.Dataset, size: int, config: Mapping[str, Any]
) -> tf.data.Dataset:
  options = tf.data.Options()
  options.deterministic = True
  # The examples are what runs in parallel.
  options.threading.max_intra_op_parallelism = 1
  if config['threads']:
    options.threading.private_threadpool_size = config['threads']
  shapes = [s.shape for s in tf.nest.flatten(examples.element_spec)]
  batch = (
    examples.batch
    if all(shape.is_fully_defined() for shape in shapes)
    else examples.ragged_batch
  )
  return (
    batch(size, drop_remainder=True)
    .prefetch(config['prefetch'])
    .with_options(options)
  )


def iterate(
  batches: tf.data.Dataset, readers: Sequence[Reader]
) -> Iterator[Batch]:
  """The batches in NumPy; reports what was skipped, names what fails."""
  sources = {reader.number: reader.source for reader in readers}
  iterator, skipped = iter(batches), _Skipped(sources)
  for done in itertools.count():
    try:
      batch = next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError as e:
      problem = _what_fails(readers, done) or tfrecord.reason(e)
      raise DataError(problem) from e
    batch = {name: _to_numpy(value) for name, value in batch.items()}
    for code in batch.pop('_skipped'):
      if code >= 0:
        skipped.add(int(code))
    yield batch


class _Skipped:
  """Reports skipped examples: the first ones by name, all by their number."""

  def __init__(self, sources: Mapping[int, Source]):
    self._sources = sources
    self._named, self._count = set(), 0

  def add(self, code: int) -> None:
    """Counts an example: number of its data set · 2^48 + its index."""
    self._count += 1
    if code not in self._named and len(self._named) < _REPORTED:
      self._named.add(code)
      where = self._sources[code >> 48].where(code % 2**48)
      note(f'skipped: {where} cannot be read')
    if self._count % 1000 == 0:
      note(f'skipped: {self._count:,} times an example that cannot be read')


def _what_fails(readers: Iterable[Reader], done: int) -> str:
  """Names what cannot be read in the batch behind `done` others."""
  for reader in readers:
    try:
      for element in reader.elements(done).take(reader.rows):
        alone = tf.data.Dataset.from_tensors(element).map(reader.finish)
        try:
          alone.get_single_element()
        except tf.errors.OpError as e:
          where = reader.source.where(int(element['index']))
          return f'{where}: {tfrecord.reason(e)}. {_ADVICE}'
    except tf.errors.OpError:
      damage = tfrecord.find_damage(reader.source.shards)
      return f'{reader.source.name}: {damage}. {_ADVICE}'
  return ''


def _to_numpy(value: tf.Tensor | tf.RaggedTensor) -> np.ndarray:
  if isinstance(value, tf.Tensor):
    return np.asarray(value)  # Without a copy.
  rows = np.empty(value.shape[0], object)
  rows[:] = [_to_numpy(row) for row in value]
  return rows


def zeros(spec: tf.TypeSpec) -> tf.Tensor | tf.RaggedTensor:
  """Zeros, empty strings; no element where the shape is not known."""
  dense = tf.zeros([n or 0 for n in spec.shape], spec.dtype)
  if isinstance(spec, tf.RaggedTensorSpec):
    return tf.RaggedTensor.from_tensor(dense, ragged_rank=spec.ragged_rank)
  return dense
