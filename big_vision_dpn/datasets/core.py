"""What every data set gives the input pipeline: a `Source`.

A source is one split, in a fixed order, of raw examples: images are still
encoded, so that reading past an example costs next to nothing. The input
pipeline alone decides order, decoding and batches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from big_vision_dpn.config import ConfigError, check_arguments, unknown

Features = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shard:
  """Records [skip, skip + take) of one TFRecord file."""

  path: str
  skip: int
  take: int


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    name: what the data set and the split are called in messages.
    parse: from a record to its features, as TensorFlow ops; encoded images
      stay byte strings.
    record_spec: tf.TensorSpec, or a tree of them, of one record.
    num_examples: examples in the split; None if that is not known because the
      data is missing.
    num_bytes: their size before decoding.
    shards: the TFRecord files that hold the records, in order.
    records: where the source is in memory instead, its records: tensors whose
      first dimension is the example.
    missing: empty, or what is missing and the command that prepares it. Such
      a source has a spec, for a dry run, and no data.
  """

  name: str
  parse: Callable[[Any], Features]
  record_spec: Any
  num_examples: int | None
  num_bytes: int = 0
  shards: tuple[Shard, ...] = ()
  records: Any = None
  missing: str = ''

  def in_memory(self) -> 'Source':
    """The same source with its records in memory."""
    if self.records is not None:
      return self
    parts = []
    for s in self.shards:
      records = tf.data.TFRecordDataset(s.path).skip(s.skip).take(s.take)
      parts += records.batch(max(s.take, 1)).take(1)
    records = tf.concat(parts, axis=0)
    return dataclasses.replace(self, shards=(), records=records)


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

  try:
    instruction = tfds.core.ReadInstruction.from_spec(split)
  except (AssertionError, ValueError) as e:
    raise ConfigError(
      f'split {split!r}: expected e.g. "train", "train[:99%]" or'
      f' "train[100:]+test": {e}'
    ) from e
  infos = {
    name: tfds.core.SplitInfo(
      name=name, shard_lengths=[n], num_bytes=0, filename_template=None
    )
    for name, n in sizes.items()
  }
  try:
    terms = instruction.to_absolute(infos)
  except (AssertionError, ValueError, KeyError) as e:
    name = split.split('[')[0].split('+')[0]
    if name not in sizes:
      raise unknown('split', name, sizes) from e
    raise ConfigError(f'split {split!r}: {e}') from e
  return [
    (t.splitname, range(sizes[t.splitname])[slice(t.from_, t.to)])
    for t in terms
  ]


def get(**data: Any) -> Source:
  """The source of a config's `data`, as big_vision's function of that name.

  Args:
    **data: `name` of an embedded data set (see `EMBEDDED`) or of TFDS, `split`,
      and for TFDS `data_dir`.

  Raises:
    ConfigError: a data set or split that does not exist, an unknown argument.
  """
  from big_vision_dpn.datasets import mnist5k, tfds

  embedded = {'mnist5k': mnist5k.get}
  if not isinstance(data.get('name'), str) or not data.get('split'):
    raise ConfigError(
      'data needs a name and a split, e.g. dict(name="cifar10", split="train")'
    )
  make = embedded.get(data['name'], tfds.get)
  check_arguments(f'data {data["name"]!r}', make, set(data) - {'name'})
  arguments = dict(data)
  if make is not tfds.get:
    arguments.pop('name')
  source = make(**arguments)
  if source.num_examples == 0:
    raise ConfigError(f'{source.name} has no examples')
  return source
