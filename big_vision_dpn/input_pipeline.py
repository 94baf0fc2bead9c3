"""From sources of examples to batches: deterministic, resumable, sharded.

A batch is a pure function of (config, seed, step). Nothing has to be saved to
go on at step n, on the same number of hosts or another. `example_order` says
which example stands in which row; random preprocessing draws from a key of
(seed, data set, epoch, example).

A host gets its rows of each global batch, as NumPy arrays. What no device can
hold, strings and features of varying length, has the dtype object.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from big_vision_dpn import example_order
from big_vision_dpn.config import ConfigError, Mistakes
from big_vision_dpn.datasets import tfrecord
from big_vision_dpn.datasets.core import (
  DataError,
  Features,
  Source,
  from_tensors,
  spec_of,
)
from big_vision_dpn.writers import note

Preprocess = Callable[[Features, tf.Tensor], Features]
Batch = dict[str, np.ndarray]

# With skip_errors: the examples that are tried in place of one that fails.
_NUM_SPARES = 8
_ADVICE = (
  'Mend it; or, with skip_errors=True, an example that cannot be read is'
  f' reported and left out, if one of {_NUM_SPARES} others can take its place'
)
# Examples whose skipping is reported one by one.
_REPORTED = 20


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


@dataclasses.dataclass(frozen=True)
class _Reader:
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
  readers, datasets = [], []
  for number, part in enumerate(parts):
    own_rows = np.flatnonzero(owner == number)
    held = np.flatnonzero(np.isin(own_rows, rows))
    if not len(held):
      continue
    reader = _training_reader(
      part, number, config, seed, start_step, len(own_rows), held
    )
    readers.append(reader)
    datasets.append(
      _finished(
        reader.elements(0),
        reader.finish,
        _spares(reader) if part.options['skip_errors'] else None,
      )
    )
  if len(datasets) == 1:
    (examples,) = datasets
  else:
    numbers = [r.number for r in readers]
    choice = np.int64([numbers.index(owner[row]) for row in rows])
    examples = tf.data.Dataset.choose_from_datasets(
      datasets, tf.data.Dataset.from_tensor_slices(choice).repeat()
    )
  return _iterate(_batched(examples, len(rows), config), readers)


def _training_reader(
  part: Part,
  number: int,
  config: Mapping[str, Any],
  seed: int,
  start_step: int,
  batch_size: int,
  rows: Sequence[int],
) -> _Reader:
  """Reads some of the data set's own `batch_size` rows of every batch."""
  options = part.options
  source = hold_in_memory(
    part.source,
    np.inf if options['cache_raw'] else config['max_in_memory_gb'],
    options['skip_errors'],
  )
  preprocess = part.preprocess
  if options['cache_final']:
    source = _preprocessed(source, preprocess, config, options['skip_errors'])
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
      spares=_NUM_SPARES if options['skip_errors'] else 0,
    )

  return _Reader(source, number, len(rows), elements, finish)


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
  source = hold_in_memory(
    source, np.inf if cache_raw else config['max_in_memory_gb'], skip_errors
  )
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

  reader = _Reader(
    source, 0, len(rows), lambda n: elements.skip(n * len(rows)), finish
  )

  def masked_out(element):
    spec = spec_of(finish, elements.element_spec)
    zeros = {name: _zeros(feature) for name, feature in spec.items()}
    skipped = tf.where(element['real'], element['index'], -1)
    return tf.data.Dataset.from_tensors({**zeros, '_skipped': skipped})

  examples = _finished(elements, finish, masked_out if skip_errors else None)
  batches = _batched(examples, len(rows), config)
  batches = batches.take(steps)
  if cache_final:
    batches = batches.cache()
  return lambda: _iterate(batches, [reader])


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


def example_spec(
  source: Source, preprocess: Preprocess
) -> dict[str, tf.TypeSpec]:
  """Specs of the preprocessed features of one example; reads no data."""
  key = tf.TensorSpec([2], tf.int64)
  return spec_of(
    lambda record, key: preprocess(source.parse(record), key),
    source.record_spec,
    key,
  )


def example_key(
  seed: int, number: int, epoch: tf.Tensor, index: tf.Tensor
) -> tf.Tensor:
  """The int64[2] key of one example of a data set in one epoch."""
  return tf.stack([epoch * 2**32 + seed, index + (number << 48)])


def hold_in_memory(
  source: Source, max_gb: float, skip_errors: bool = False
) -> Source:
  """The source in memory if its raw bytes are at most `max_gb` × 10^9."""
  if source.num_bytes > max_gb * 1e9:
    return source
  return source.in_memory(skip_errors=skip_errors)


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


def _preprocessed(
  source: Source,
  preprocess: Preprocess,
  config: Mapping[str, Any],
  skip_errors: bool,
) -> Source:
  """The final features of the whole split, in memory."""
  start = inference(
    source,
    preprocess,
    config,
    batch_size=64,
    rows=range(64),
    ordered=True,
    skip_errors=skip_errors,
  )
  note(f'{source.name}: preprocessing all of it, for cache_final')
  batches = [
    {k: v[batch['_mask'] == 1] for k, v in batch.items() if k != '_mask'}
    for batch in start()
  ]
  table = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  return from_tensors(source.name, table)


def _record(source: Source, element: Mapping[str, Any]) -> Any:
  if source.lookup is None:
    return element['record']
  return source.lookup(element['index'])


def _spares(reader: _Reader) -> Callable[[Any], tf.data.Dataset]:
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


def _finished(
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


def _batched(
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


def _iterate(
  batches: tf.data.Dataset, readers: Sequence[_Reader]
) -> Iterator[Batch]:
  """The batches in NumPy; reports what was skipped, names what fails."""
  sources = {reader.number: reader.source for reader in readers}
  iterator, skipped = iter(batches), 0
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
        skipped += 1
        _report_skipped(sources[code >> 48], int(code % 2**48), skipped)
    yield batch


def _report_skipped(source: Source, index: int, count: int) -> None:
  if count <= _REPORTED:
    note(f'skipped: {source.where(index)} cannot be read')
  elif count % 1000 == 0:
    note(f'skipped: {count:,} examples so far')


def _what_fails(readers: Iterable[_Reader], done: int) -> str:
  """Names what cannot be read in the batch behind `done` others."""
  for reader in readers:
    try:
      for element in reader.elements(done).take(reader.rows):
        try:
          reader.finish(element)
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


def _zeros(spec: tf.TypeSpec) -> tf.Tensor | tf.RaggedTensor:
  """Zeros, empty strings; no element where the shape is not known."""
  zeros = tf.zeros([n or 0 for n in spec.shape], spec.dtype)
  if isinstance(spec, tf.RaggedTensorSpec):
    return tf.RaggedTensor.from_tensor(zeros, ragged_rank=spec.ragged_rank)
  return zeros


def batch_shapes(
  spec: Mapping[str, tf.TypeSpec], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch of the features that devices can hold."""
  return {
    key: jax.ShapeDtypeStruct((batch_size, *s.shape), s.dtype.as_numpy_dtype)
    for key, s in spec.items()
    if _fits_devices(s)
  }


def _fits_devices(spec: tf.TypeSpec) -> bool:
  return (
    isinstance(spec, tf.TensorSpec)
    and spec.dtype != tf.string
    and spec.shape.is_fully_defined()
  )


def check_example_spec(
  spec: Mapping[str, tf.TypeSpec], needs: Sequence[str]
) -> None:
  """Raises ConfigError unless examples have what the devices need.

  Args:
    spec: of one preprocessed example.
    needs: the features that must be there, numeric and of a fixed shape.
  """
  mistakes = Mistakes()
  for name in needs:
    with mistakes.of(''):
      if name not in spec:
        raise ConfigError(
          f'gives {", ".join(map(repr, spec)) or "nothing"}, but {name!r} is'
          ' needed; let it make and keep it'
        )
      feature = spec[name]
      if feature.dtype == tf.string:
        raise ConfigError(
          f'gives {name!r} as a string; expected numbers. If it is an encoded'
          ' image, add decode'
        )
      if not _fits_devices(feature):
        raise ConfigError(
          f'leaves {name!r} with the shape {feature.shape}, so that examples'
          ' differ; add e.g. resize(224) or central_crop(224)'
        )
  mistakes.check()
