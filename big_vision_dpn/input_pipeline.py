"""From sources of examples to batches: deterministic, resumable, sharded.

A batch is a pure function of (config, seed, step). Nothing has to be saved to
go on at step n, on the same number of hosts or another. `example_order` says
which example stands in which row; random preprocessing draws from a key of
(seed, data set, epoch, example).

A host gets its rows of each global batch, as NumPy arrays. What no device can
hold, strings and features of varying length, has the dtype object.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn import example_order, host_batches
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import tfrecord
from big_vision_dpn.datasets.core import (
  DataError,
  Features,
  Source,
  from_tensors,
  spec_of,
)
from big_vision_dpn.example_spec import Preprocess
from big_vision_dpn.host_batches import Batch, Reader
from big_vision_dpn.writers import note


@dataclasses.dataclass(frozen=True)
class Part:
  """One data set of the training data.

  Attributes:
    source: the split.
    preprocess: from raw features and an int64[2] key to the final features.
    options: the resolved fields that each data set has its own of:
      shuffle_buffer_size, cache_raw, cache_final, skip_errors.
    weight: its share of every batch, in proportion to the other parts'.
  """

  source: Source
  preprocess: Preprocess
  options: Mapping[str, Any]
  weight: float = 1.0


def training(
  parts: Sequence[Part],
  config: Mapping[str, Any],
  *,
  seed: int,
  start_step: int,
  rows: Sequence[int],
) -> Iterator[Batch]:
  """The training batches from step `start_step` (0 is the first) on, forever.

  Args:
    parts: the data sets; see `rows_of_parts` for where they stand in a batch.
    config: the resolved `config.input`.
    seed: of order and augmentation.
    start_step: the number of batches to start behind.
    rows: the rows of the global batch that this process holds, ascending.

  Yields:
    Batches of len(rows) examples.

  Raises:
    DataError: data that cannot be read; it names the file and the record.
  """
  owner = rows_of_parts([p.weight for p in parts], config['batch_size'])
  readers = _training_readers(parts, config, seed, start_step, rows)
  datasets = [
    host_batches.finished(
      reader.elements(0),
      reader.finish,
      host_batches.spares(reader)
      if parts[reader.number].options['skip_errors']
      else None,
    )
    for reader in readers
  ]
  if len(datasets) == 1:
    (examples,) = datasets
  else:
    numbers = [r.number for r in readers]
    choice = np.int64([numbers.index(owner[row]) for row in rows])
    examples = tf.data.Dataset.choose_from_datasets(
      datasets, tf.data.Dataset.from_tensor_slices(choice).repeat()
    )
  return host_batches.iterate(
    host_batches.batched(examples, len(rows), config), readers
  )


def examples_of_step(
  parts: Sequence[Part],
  config: Mapping[str, Any],
  *,
  seed: int,
  step: int,
  rows: Sequence[int],
) -> list[str]:
  """Where the examples of a training batch are, data set by data set.

  Args:
    step: 0 is the first.
    **: as for `training`.

  Returns:
    For each of the rows the data set, the example's number and its file. Of an
    example that `skip_errors` has replaced it is the one that was replaced.
  """
  places = []
  for reader in _training_readers(parts, config, seed, step, rows):
    for element in reader.elements(0).take(reader.rows):
      places.append(reader.source.where(int(element['index'])))
  return places


def _training_readers(
  parts: Sequence[Part],
  config: Mapping[str, Any],
  seed: int,
  start_step: int,
  rows: Sequence[int],
) -> list[Reader]:
  """Of the data sets that stand in these rows."""
  owner = rows_of_parts([p.weight for p in parts], config['batch_size'])
  readers = []
  for number, part in enumerate(parts):
    own_rows = np.flatnonzero(owner == number)
    held = np.flatnonzero(np.isin(own_rows, rows))
    if len(held):
      readers.append(
        _training_reader(
          part, number, config, seed, start_step, len(own_rows), held
        )
      )
  return readers


def _training_reader(
  part: Part,
  number: int,
  config: Mapping[str, Any],
  seed: int,
  start_step: int,
  batch_size: int,
  rows: Sequence[int],
) -> Reader:
  """Reads some of the data set's own `batch_size` rows of every batch."""
  options = part.options
  skip_errors = options['skip_errors']
  source = _held(part.source, config, options['cache_raw'], skip_errors)
  preprocess = part.preprocess
  if options['cache_final']:
    note(f'{source.name}: preprocessing all of it, for cache_final')
    source = _table_of(source, preprocess, config, skip_errors)
    preprocess = lambda features, key: features

  def finish(element):
    key = example_key(seed, number, element['epoch'], element['index'])
    return preprocess(source.parse(_record(source, element)), key)

  def elements(done):
    return example_order.shuffled(
      source,
      # Two data sets of one size shall not be shuffled alike.
      seed=seed + (number << 32),
      start_step=start_step + done,
      batch_size=batch_size,
      rows=rows,
      max_streams=config['streams'],
      shuffle_buffer_size=options['shuffle_buffer_size'],
      spares=host_batches.NUM_SPARES if skip_errors else 0,
    )

  return Reader(source, number, len(rows), elements, finish)


def inference(
  source: Source,
  preprocess: Preprocess,
  config: Mapping[str, Any],
  *,
  batch_size: int,
  rows: Sequence[int],
  ordered: bool = False,
  cache_raw: bool = False,
  cache_final: bool = False,
  skip_errors: bool = False,
) -> Callable[[], Iterator[Batch]]:
  """Every example of a split once, in batches of a fixed size.

  Args:
    source: the split.
    preprocess: as for `training`; its key has seed 0 and epoch 0.
    config: a resolved `config.input`; read are max_in_memory_gb, streams,
      threads and prefetch.
    batch_size: of the global batch.
    rows: the rows of the global batch that this process holds, ascending.
    ordered: batch after batch is the split in its own order, for which each
      process reads all of its TFRecord files. Without it, that holds only for
      a split in memory or with random access.
    cache_raw: hold the undecoded records in memory, however many they are.
    cache_final: hold this process's batches in memory from the first pass on.
    skip_errors: an example that cannot be read is masked out and reported.

  Returns:
    A function that starts a pass: the same number of batches on every host,
    each with a float32 `_mask`: 1 for an example, 0 for padding. The passes
    raise DataError as `training` does.
  """
  source = _held(source, config, cache_raw, skip_errors)
  elements, steps = example_order.in_order(
    source,
    batch_size=batch_size,
    rows=rows,
    max_streams=1 if ordered else config['streams'],
    skip_errors=skip_errors,
  )

  def finish(element):
    epoch = tf.constant(0, tf.int64)
    key = example_key(0, 0, epoch, element['index'])
    features = preprocess(source.parse(_record(source, element)), key)
    return {**features, '_mask': tf.cast(element['real'], tf.float32)}

  reader = Reader(
    source, 0, len(rows), lambda n: elements.skip(n * len(rows)), finish
  )

  def masked_out(element):
    spec = spec_of(finish, elements.element_spec)
    zeros = {
      name: host_batches.zeros(feature) for name, feature in spec.items()
    }
    skipped = tf.where(element['real'], element['index'], -1)
    return tf.data.Dataset.from_tensors({**zeros, '_skipped': skipped})

  examples = host_batches.finished(
    elements, finish, masked_out if skip_errors else None
  )
  batches = host_batches.batched(examples, len(rows), config)
  batches = batches.take(steps)
  if cache_final:
    batches = batches.cache()
  return lambda: host_batches.iterate(batches, [reader])


def rows_of_parts(weights: Sequence[float], batch_size: int) -> np.ndarray:
  """Which data set stands in which row of every batch.

  Each has the number of rows nearest to its share, spread evenly over the
  batch. So a step number is still all there is to know, and no batch is by
  chance without one of them.

  Args:
    weights: of the data sets, in any unit.
    batch_size: of the global batch.

  Returns:
    int array [batch_size], the numbers of data sets.

  Raises:
    ConfigError: weights that are not positive, or so small that a data set
      has no row.
  """
  weights = np.asarray(weights, np.float64)
  if not (weights > 0).all():
    raise ConfigError(f'weights {weights.tolist()}: expected positive numbers')
  share = weights / weights.sum()
  owner, given = np.zeros(batch_size, int), np.zeros(len(weights))
  for row in range(batch_size):
    owner[row] = np.argmax(share * (row + 1) - given)
    given[owner[row]] += 1
  if not given.all():
    raise ConfigError(
      f'weights {weights.tolist()}: a batch of {batch_size} has no row for the'
      f' smallest; expected at least 1/{batch_size} of their sum'
    )
  return owner


def example_key(
  seed: int, number: int, epoch: tf.Tensor, index: tf.Tensor
) -> tf.Tensor:
  """The int64[2] key of one example of a data set in one epoch."""
  return tf.stack([epoch * 2**32 + seed, index + (number << 48)])


def _held(
  source: Source,
  config: Mapping[str, Any],
  cache_raw: bool,
  skip_errors: bool,
) -> Source:
  """The source in memory, undecoded, if it is small enough or has to be."""
  if cache_raw and source.lookup is not None:  # Records may be paths of files.
    as_it_is = lambda features, key: features
    return _table_of(source, as_it_is, config, skip_errors)
  if cache_raw or source.num_bytes <= config['max_in_memory_gb'] * 1e9:
    return source.in_memory(skip_errors=skip_errors)
  return source


def filtered(source: Source, keep: Callable[[Features], tf.Tensor]) -> Source:
  """The source of the examples for which `keep(raw features)` is true.

  Reads the whole split once, so that its size, and with it every epoch, is
  exact.

  Raises:
    ConfigError: no boolean scalar, or no example is left.
    DataError: data that cannot be read.
  """
  keep = tf.autograph.experimental.do_not_convert(keep)
  verdict = lambda record: keep(source.parse(record))
  spec = spec_of(verdict, source.record_spec)
  if not isinstance(spec, tf.TensorSpec) or (spec.dtype, spec.shape) != (
    tf.bool,
    tf.TensorShape([]),
  ):
    raise ConfigError(f'gives {spec}; expected one boolean for an example')
  if source.missing:
    return dataclasses.replace(source, num_examples=None)
  note(f'{source.name}: reading all of it for pre_filter_fn')
  elements, _ = example_order.in_order(
    source, batch_size=1, rows=[0], max_streams=1
  )
  verdicts = elements.map(
    lambda e: verdict(_record(source, e)), num_parallel_calls=tf.data.AUTOTUNE
  )
  try:
    kept = np.concatenate(list(verdicts.batch(1024).as_numpy_iterator()))
  except tf.errors.OpError as e:
    raise DataError(
      f'{source.name}, pre_filter_fn: {tfrecord.reason(e)}'
    ) from e
  if not kept.any():
    raise ConfigError('leaves no example')
  note(f'{source.name}: {kept.sum():,} of {len(kept):,} examples pass')
  return source.choose(np.flatnonzero(kept))


def _table_of(
  source: Source,
  preprocess: Preprocess,
  config: Mapping[str, Any],
  skip_errors: bool,
) -> Source:
  """The preprocessed features of the whole split, in memory."""
  start = inference(
    source,
    preprocess,
    config,
    batch_size=64,
    rows=range(64),
    ordered=True,
    skip_errors=skip_errors,
  )
  batches = [
    {k: v[batch['_mask'] == 1] for k, v in batch.items() if k != '_mask'}
    for batch in start()
  ]
  return from_tensors(
    source.name, {k: _column([b[k] for b in batches]) for k in batches[0]}
  )


def _column(parts: Sequence[np.ndarray]) -> np.ndarray | tf.RaggedTensor:
  column = np.concatenate(parts)
  if column.dtype == object and isinstance(column[0], np.ndarray):
    return tf.ragged.stack(list(column))
  return column


def _record(source: Source, element: Mapping[str, Any]) -> Any:
  if source.lookup is None:
    return element['record']
  return source.lookup(element['index'])
