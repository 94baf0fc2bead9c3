"""What every data set gives the input pipeline: a `Source`.

A source is one split, in a fixed order, of raw examples: images are still
encoded, so that reading past an example costs next to nothing. The input
pipeline alone decides order, decoding and batches.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, check_arguments, unknown
from big_vision_dpn.datasets import tfrecord

Features = dict[str, Any]


class DataError(RuntimeError):
  """Data that is damaged; the message names the file and the record."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set: TFRecord files, or records looked up by index.

  Attributes:
    name: what the data set and the split are called in messages.
    parse: from a record to its features, as TensorFlow ops; encoded images
      stay byte strings.
    record_spec: tf.TensorSpec, or a tree of them, of one record.
    num_examples: examples in the split; None if that is not known because the
      data is missing.
    num_bytes: their size before decoding; for TFRecord files.
    shards: the TFRecord files that hold the records, in order.
    lookup: in their place, the record of an index, an int64 scalar, as
      TensorFlow ops that `tf.data` calls in parallel.
    locate: names the example of an index and its file, for messages.
    kept: of the records in `shards`, the ascending positions of those that
      count; None for all.
    missing: empty, or what is missing and the command that prepares it. Such
      a source has a spec, for a dry run, and no data.
  """

  name: str
  parse: Callable[[Any], Features]
  record_spec: Any
  num_examples: int | None
  num_bytes: int = 0
  shards: tuple[tfrecord.Shard, ...] = ()
  lookup: Callable[[tf.Tensor], Any] | None = None
  locate: Callable[[int], str] | None = None
  kept: np.ndarray | None = None
  missing: str = ''

  def in_memory(self, *, skip_errors: bool = False) -> 'Source':
    """The same source with the records of its files in memory."""
    if self.lookup is not None:
      return self
    parts = []
    for shard in self.shards:
      records = tfrecord.read(
        shard.path, shard.skip, shard.take, skip_errors=skip_errors
      )
      try:
        parts += records.batch(max(shard.take, 1)).take(1)
      except tf.errors.OpError as e:
        raise DataError(
          f'{self.name}: {shard.path}: {tfrecord.reason(e)}'
        ) from e
    held = dataclasses.replace(
      self,
      shards=(),
      lookup=row_of(tf.concat(parts, axis=0)),
      locate=dataclasses.replace(self, kept=None).where,
      kept=None,
    )
    return held if self.kept is None else held.choose(self.kept)

  def choose(self, kept: np.ndarray) -> 'Source':
    """The source of these examples alone, ascending indices in this one."""
    if self.kept is not None:
      kept = self.kept[kept]
    chosen = dataclasses.replace(self, num_examples=len(kept), kept=kept)
    if self.lookup is None:
      return chosen
    table = tf.constant(kept, tf.int64)
    return dataclasses.replace(
      chosen,
      lookup=lambda index: self.lookup(table[index]),
      locate=lambda index: self.where(int(kept[index])),
      kept=None,
    )

  def where(self, index: int) -> str:
    """The name and the place of an example, for messages."""
    if self.locate is not None:
      return self.locate(index)
    place = index if self.kept is None else int(self.kept[index])
    for shard in self.shards:
      if place < shard.take:
        record = shard.skip + place
        return f'{self.name}, example {index}: record {record} of {shard.path}'
      place -= shard.take
    return f'{self.name}, example {index}'


def row_of(table: Any) -> Callable[[tf.Tensor], Any]:
  """A `lookup` in tensors, or a tree of them, whose first dimension counts."""
  return lambda index: tf.nest.map_structure(lambda t: t[index], table)


def from_tensors(name: str, table: Mapping[str, Any]) -> Source:
  """A source of examples in memory.

  Args:
    name: what messages call it.
    table: features by name, arrays or tensors, also ragged ones; the first
      dimension of each is the example.
  """
  table = {
    key: value
    if isinstance(value, tf.RaggedTensor)
    else tf.convert_to_tensor(value)
    for key, value in table.items()
  }
  return Source(
    name=name,
    parse=lambda record: record,
    record_spec={
      k: tf.TensorSpec(t.shape[1:], t.dtype) for k, t in table.items()
    },
    num_examples=int(next(iter(table.values())).shape[0]),
    lookup=row_of(table),
  )


def spec_of(fn: Callable, *specs: Any) -> Any:
  """The tf.TensorSpecs that `fn` returns for inputs of the given specs."""
  traced = tf.function(fn).get_concrete_function(*specs)
  return tf.nest.map_structure(
    lambda t: tf.type_spec_from_value(t), traced.structured_outputs
  )


def slice_split(
  split: str, sizes: Mapping[str, int]
) -> list[tuple[str, range]]:
  """Resolves TFDS's slicing language, e.g. "train[:99%]+test[5:]".

  Args:
    split: the expression.
    sizes: examples of every whole split.

  Returns:
    (name of the whole split, range of examples) for every term.

  Raises:
    ConfigError: an unknown split, or an expression that does not parse.
  """
  import tensorflow_datasets as tfds

  # Where a split is called "all": TFDS reads that as the sum of all splits,
  # which it does not slice.
  names = {'_all' if name == 'all' else name: name for name in sizes}
  spec = split
  if 'all' in sizes:
    spec = re.sub(r'(?<![\w-])all(?![\w-])', '_all', split)
  try:
    instruction = tfds.core.ReadInstruction.from_spec(spec)
  except (AssertionError, ValueError, NotImplementedError) as e:
    raise ConfigError(
      f'split {split!r}: expected e.g. "train", "train[:99%]" or'
      f' "train[100:]+test": {e}'
    ) from e
  infos = {
    name: tfds.core.SplitInfo(
      name=name,
      shard_lengths=[sizes[whole]],
      num_bytes=0,
      filename_template=None,
    )
    for name, whole in names.items()
  }
  try:
    terms = instruction.to_absolute(infos)
  except (AssertionError, ValueError, KeyError) as e:
    for term in split.split('+'):
      name = term.partition('[')[0].strip()
      if name not in sizes:
        raise unknown('split', name, sizes) from e
    raise ConfigError(f'split {split!r}: {e}') from e
  terms = [(names[t.splitname], slice(t.from_, t.to)) for t in terms]
  return [(whole, range(sizes[whole])[part]) for whole, part in terms]


# Data sets of ours, each a module with a function `get` that returns a Source.
_OURS = ('image_folder', 'jsonl', 'mnist5k', 'npz')


def get(**data: Any) -> Source:
  """The source of a config's `data`, as big_vision's function of that name.

  Args:
    **data: `name`, and the arguments of that data set, such as `split`. A name
      "bv:MODULE" is a module of `datasets`, or with a dot any module of the
      user's, whose function get(**arguments) returns a Source. Any other name
      is a data set of TFDS, with `split` and `data_dir`.

  Raises:
    ConfigError: a data set or split that does not exist, an unknown argument.
  """
  arguments = dict(data)
  name = arguments.pop('name', None)
  if not isinstance(name, str):
    raise ConfigError(
      'data needs a name, e.g. dict(name="cifar10", split="train")'
    )
  if name.startswith('bv:'):
    make = _module(name.removeprefix('bv:')).get
  else:
    make = importlib.import_module('big_vision_dpn.datasets.tfds').get
    arguments['name'] = name
  what = f'data {name!r}'
  check_arguments(what, make, arguments)
  for parameter in inspect.signature(make).parameters.values():
    required = parameter.default is parameter.empty
    if required and arguments.get(parameter.name) is None:
      raise ConfigError(f'{what} needs {parameter.name!r}')
  source = make(**arguments)
  if source.num_examples == 0:
    raise ConfigError(f'{source.name} has no examples')
  return source


def _module(name: str) -> Any:
  if '.' not in name and name not in _OURS:
    raise unknown('data set', f'bv:{name}', [f'bv:{n}' for n in _OURS])
  path = name if '.' in name else f'big_vision_dpn.datasets.{name}'
  try:
    module = importlib.import_module(path)
  except ImportError as e:
    raise ConfigError(f'data: module {path} does not import: {e}') from e
  if not hasattr(module, 'get'):
    raise ConfigError(
      f'data: module {path} has no function get, which returns a Source'
    )
  return module
