"""Data sets of TensorFlow Datasets (TFDS): tfrecord and array_record files."""

import dataclasses
import difflib
import os
import shlex
from typing import Any

import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import array_record, core, tfrecord

# Examples of the official splits, so that a dry run can tell epochs and steps
# without the data. TFDS ships no such table.
OFFICIAL_SIZES = {
  'cifar10': {'train': 50_000, 'test': 10_000},
  'cifar100': {'train': 50_000, 'test': 10_000},
  'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
  'imagenet2012_real': {'validation': 50_000},
  'imagenet_v2': {'test': 10_000},
}


def make_builder(name: str, data_dir: str | None) -> Any:
  """`tfds.builder`, with a ConfigError where there is no such data set."""
  import tensorflow_datasets as tfds

  from big_vision_dpn.datasets import imagenet21k  # noqa: F401  Registers it.

  if name.startswith(('/', './', '../', '~', 'gs://', 's3://')):
    return _read_prepared(name, data_dir)
  try:
    return tfds.builder(name, data_dir=data_dir)
  except (
    tfds.core.DatasetNotFoundError,
    AssertionError,
    ValueError,
    ModuleNotFoundError,
  ) as e:
    base = name.partition(':')[0].partition('/')[0]
    near = difflib.get_close_matches(base, tfds.list_builders(), n=1)
    hint = f' Did you mean {near[0]!r}?' if near and near[0] != base else ''
    first_line = str(e).strip().partition('\n')[0]
    folder = data_dir or tfds.core.constants.DATA_DIR
    raise ConfigError(
      f'no data set {name!r} in TFDS or prepared in {folder}.{hint}'
      f' ({first_line})'
    ) from e


def _read_prepared(folder: str, data_dir: str | None) -> Any:
  """The builder of a prepared folder, whose data set needs no code."""
  import tensorflow_datasets as tfds

  if data_dir:
    raise ConfigError(
      f'{folder} is a folder, so data_dir={data_dir!r} means nothing; give one'
      ' of them, or the name of a data set in data_dir'
    )
  folder = os.path.expanduser(folder)
  try:
    return tfds.builder_from_directory(folder)
  except tfds.core.dataset_info.DatasetInfoFileError as e:
    info = 'dataset_info.json'
    found = tf.io.gfile.glob([f'{folder}/{"*/" * n}{info}' for n in (1, 2)])
    near = ', '.join(sorted(os.path.dirname(path) for path in found))
    raise ConfigError(
      f'no data set prepared by TFDS in {folder}: it holds no {info}. Expected'
      f' {near or "a folder like ~/tensorflow_datasets/cifar10/3.0.2"}'
    ) from e


def how_to_prepare(builder: Any, name: str, data_dir: str | None) -> str:
  """The command that prepares the data, and what must be there before."""
  import tensorflow_datasets as tfds

  arguments = [name, *([f'--data_dir={data_dir}'] if data_dir else [])]
  command = f'bash tools/run.sh tools.prepare_data {shlex.join(arguments)}'
  manual = getattr(builder, 'MANUAL_DOWNLOAD_INSTRUCTIONS', None)
  if not manual:
    return f'prepare it with\n{command}'
  root = data_dir or tfds.core.constants.DATA_DIR
  return (
    f'its files cannot be downloaded without an account. Put them into'
    f' {root}/downloads/manual:\n{manual.strip()}\nthen run\n{command}'
  )


def get(name: str, split: str, data_dir: str | None = None) -> core.Source:
  """A split of a TFDS data set.

  Args:
    name: as for `tfds.builder`: "cifar10", "imagenet_v2/matched-frequency",
      "caltech101:3.0.1"; or the folder of a prepared one, local or gs://:
      "/data/my_set/1.0.0". Prepared data needs none of its data set's code.
    split: in TFDS's slicing language.
    data_dir: folder, local or gs://; by default TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    The source. Top-level images stay encoded; other features are decoded as
    TFDS defines them. Without the data the source says what is `missing`.

  Raises:
    ConfigError: no such data set or split; files of another format than
      tfrecord and array_record.
  """
  import tensorflow_datasets as tfds

  builder = make_builder(name, data_dir)
  features = builder.info.features
  encoded = {
    key: tfds.decode.SkipDecoding()
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  common = {
    'name': f'{name} {split}',
    'parse': lambda r: features.deserialize_example(r, decoders=encoded),
    'record_spec': tf.TensorSpec([], tf.string),
  }
  if not builder.info.splits:
    return core.Source(
      **common,
      num_examples=_official_size(builder, split),
      missing=f'{name} is not in {builder.data_dir}: '
      + how_to_prepare(builder, name, data_dir),
    )
  formats = tfds.core.FileFormat
  if builder.info.file_format not in (formats.TFRECORD, formats.ARRAY_RECORD):
    raise ConfigError(
      f'{name} is stored as {builder.info.file_format.value}; expected tfrecord'
      f' or array_record. Move {builder.data_dir} away and prepare it again:'
      ' tools.prepare_data writes tfrecord'
    )
  sizes = {k: s.num_examples for k, s in builder.info.splits.items()}
  core.slice_split(split, sizes)  # For its clear errors.
  info = builder.info.splits[split]
  source = core.Source(
    **common,
    num_examples=info.num_examples,
    num_bytes=_num_bytes(builder, split),
    shards=tuple(
      tfrecord.Shard(
        path=f.filename,
        skip=f.skip,
        take=f.examples_in_shard - f.skip if f.take == -1 else f.take,
      )
      for f in info.file_instructions
    ),
  )
  if builder.info.file_format == formats.TFRECORD:
    return source
  return dataclasses.replace(
    source,
    num_bytes=0,
    shards=(),
    lookup=array_record.make_lookup(source.shards),
    locate=source.where,
  )


def _official_size(builder: Any, split: str) -> int | None:
  ours = getattr(builder.builder_config, 'sizes', None)
  sizes = OFFICIAL_SIZES.get(builder.name, ours)
  if sizes is None:
    return None
  return sum(len(r) for _, r in core.slice_split(split, sizes))


def _num_bytes(builder: Any, split: str) -> int:
  """Bytes of a split, of a slice in proportion to its examples."""
  total = 0
  splits = builder.info.splits
  sizes = {k: s.num_examples for k, s in splits.items()}
  for whole, part in core.slice_split(split, sizes):
    info = splits[whole]
    total += info.num_bytes * len(part) // max(info.num_examples, 1)
  return total
