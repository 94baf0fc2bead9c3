"""Examples in a .jsonl file, one JSON object a line, with files beside it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, unknown
from big_vision_dpn.datasets import core

# How a type of JSON's is called in messages.
_KINDS = {
  str: 'a string',
  bool: 'true or false',
  int: 'a number',
  float: 'a number',
  list: 'a list',
  dict: 'an object',
  type(None): 'null',
}
_BY_KIND = {'a string': tf.string, 'true or false': tf.bool}
_SCALARS = 'a number, a string, true or false'


def get(
  fname: str,
  split: str = 'all',
  fopen_keys: Sequence[str] | Mapping[str, str] = (),
) -> core.Source:
  """The lines of a .jsonl file, as big_vision's data set of that name.

  Args:
    fname: the file, local or gs://. Every line has the same fields: numbers,
      strings, true or false, or lists of them. Empty lines are passed over.
    split: "all" or a slice of it in TFDS's language, e.g. "all[:1000]".
    fopen_keys: the fields that hold the path of a file, such as an image: the
      feature is what the file holds. A dict gives for each field the folder
      its paths are in. Paths that are not absolute start at the .jsonl's
      folder.

  Returns:
    The source. Features: those of the lines. Whole numbers are int64; if there
    is any other in the field, all are float32; strings are UTF-8 bytes, or
    whatever bytes the file has. Lists are 1-D; of static length if it is the
    same on all lines, not only those of the split. `id`, a string, is the
    place of the example in the whole file, from 0, unless a field has that
    name.

  Raises:
    ConfigError: no such file or field; a line that is no JSON, or that does not
      have the fields and types of the first; it names the line.
  """
  path = os.path.expanduser(fname)
  numbers, columns = _read(path)
  n = len(numbers)
  terms = core.slice_split(split, {'all': n})
  folders = _folders(fopen_keys, path, columns)
  for key, folder in folders.items():
    columns[key] = _paths(columns[key], folder, f'{path}, {key!r}', numbers)
  table = {
    key: _tensor(values, f'{path}, {key!r}', numbers)
    for key, values in columns.items()
  }
  table.setdefault('id', tf.constant([str(i) for i in range(n)], tf.string))
  index = np.concatenate([np.arange(r.start, r.stop) for _, r in terms])
  if len(index):  # A wrong folder shows in the first file.
    _check_files({key: table[key][index[0]] for key in folders}, path)
  if not np.array_equal(index, np.arange(n)):
    table = {key: tf.gather(values, index) for key, values in table.items()}
  name = f'jsonl {fname} {split}'

  def parse(record):
    return record | {key: tf.io.read_file(record[key]) for key in folders}

  def locate(i):
    files = [table[key][i].numpy().decode(errors='replace') for key in folders]
    line = f'line {numbers[index[i]]} of {path}'
    return f'{name}, example {i}: {", ".join([line, *files])}'

  return core.Source(
    name=name,
    parse=parse,
    record_spec={
      k: tf.TensorSpec(v.shape[1:], v.dtype) for k, v in table.items()
    },
    num_examples=len(index),
    lookup=lambda index: {k: _row(v, index) for k, v in table.items()},
    locate=locate,
  )


def _read(path: str) -> tuple[list[int], dict[str, list]]:
  """The numbers of the lines that are not empty, and the values by field."""
  numbers: list[int] = []
  columns: dict[str, list] = {}
  try:
    with tf.io.gfile.GFile(path, 'rb') as f:
      for number, line in enumerate(f, start=1):
        if line.strip():
          _add(line, f'line {number} of {path}', numbers, columns)
          numbers.append(number)
  except tf.errors.OpError as e:
    raise ConfigError(f'cannot read {path}: {e.message}') from e
  if not columns:
    raise ConfigError(
      f'{path} holds no examples; expected a JSON object a line'
    )
  return numbers, columns


def _add(
  line: bytes, where: str, numbers: list[int], columns: dict[str, list]
) -> None:
  """Adds the values of a line to the columns, which the first line makes."""
  try:
    # What is not UTF-8 in a string comes through.
    text = line.removeprefix(b'\xef\xbb\xbf').decode('utf-8', 'surrogateescape')
    fields = json.loads(text)
  except json.JSONDecodeError as e:
    raise ConfigError(f'{where} is no JSON: {e.msg}, column {e.colno}') from e
  if not isinstance(fields, dict):
    raise ConfigError(
      f'{where} is {_KINDS[type(fields)]}; expected an object: {{"image": …}}'
    )
  if not numbers:
    columns |= {key: [] for key in fields}
  if fields.keys() != columns.keys():
    problems = [f'lacks {key!r}' for key in columns.keys() - fields.keys()]
    problems += [f'also has {key!r}' for key in fields.keys() - columns.keys()]
    raise ConfigError(
      f'{where} {" and ".join(sorted(problems))}; expected the fields of the'
      f' first line: {", ".join(columns)}'
    )
  for key, values in columns.items():
    values.append(fields[key])


def _folders(
  fopen_keys: Any, path: str, columns: dict[str, list]
) -> dict[str, str]:
  """For the fields that hold paths: the folder where these start."""
  if isinstance(fopen_keys, str):
    raise ConfigError(
      f'fopen_keys is {fopen_keys!r}; expected a list of fields, e.g.'
      f' [{fopen_keys!r}], or a dict from field to folder'
    )
  if not hasattr(fopen_keys, 'items'):  # A ConfigDict is no Mapping.
    fopen_keys = dict.fromkeys(fopen_keys or (), '')
  for key in fopen_keys:
    if key not in columns:
      raise unknown(f'field in fopen_keys of {path}', key, columns)
  here = os.path.dirname(path)
  return {key: _join(here, folder) for key, folder in fopen_keys.items()}


def _join(folder: str, path: str) -> str:
  if '://' in path:
    return path
  return os.path.join(folder, os.path.expanduser(path))


def _paths(
  values: list, folder: str, where: str, numbers: list[int]
) -> list[str]:
  """The values as paths of files."""
  for value, number in zip(values, numbers, strict=True):
    if not isinstance(value, str):
      raise _wrong(where, number, value, 'a string, the path of a file')
    if value.startswith(('http://', 'https://')):
      raise ConfigError(
        f'{where}: line {number} is the address {value}; expected the path of a'
        ' file. Download it first'
      )
  return [_join(folder, value) for value in values]


def _check_files(paths: dict[str, tf.Tensor], fname: str) -> None:
  for key, value in paths.items():
    file = value.numpy().decode(errors='replace')
    if not tf.io.gfile.exists(file):
      raise ConfigError(
        f'{fname}: the first file of {key!r}, {file}, does not exist; expected'
        f' paths that start at {os.path.dirname(fname) or "."}, or'
        f' fopen_keys={{{key!r}: FOLDER}}'
      )


def _tensor(
  values: list, where: str, numbers: list[int]
) -> tf.Tensor | tf.RaggedTensor:
  """A field of all lines: scalars, or lists as a dense or a ragged tensor."""
  if not isinstance(values[0], list):
    return tf.constant(*_scalars(values, where, numbers, _SCALARS))
  for value, number in zip(values, numbers, strict=True):
    if not isinstance(value, list):
      raise _wrong(where, number, value, 'a list, as on the first line')
  lengths = [len(value) for value in values]
  flat, dtype = _scalars(
    [item for value in values for item in value],
    where,
    np.repeat(numbers, lengths),
    f'lists of {_SCALARS}',
  )
  flat = tf.constant(flat, dtype)
  if len(set(lengths)) == 1:
    return tf.reshape(flat, [len(values), lengths[0]])
  return tf.RaggedTensor.from_row_lengths(flat, lengths)


def _row(values: tf.Tensor | tf.RaggedTensor, index: tf.Tensor) -> tf.Tensor:
  if isinstance(values, tf.Tensor):
    return values[index]
  # values[index] does the same, in a time that grows with the number of rows.
  ends = values.row_splits
  return values.values[ends[index] : ends[index + 1]]


def _scalars(
  values: list, where: str, numbers: Sequence[int], allowed: str
) -> tuple[list, tf.DType]:
  """Values of one kind, and their dtype."""
  if not values:
    return [], tf.string
  kind = _KINDS[type(values[0])]
  if not isinstance(values[0], str | int | float):
    raise _wrong(where, numbers[0], values[0], allowed)
  for value, number in zip(values, numbers, strict=True):
    if _KINDS[type(value)] != kind:
      raise _wrong(where, number, value, f'{kind}, as on the lines before')
    if isinstance(value, int) and abs(value) >= 2**63:
      raise _wrong(where, number, value, 'at most 63 bits')
  if kind == 'a string':
    return [_bytes(value) for value in values], tf.string
  if any(isinstance(value, float) for value in values):
    return values, tf.float32
  return values, _BY_KIND.get(kind, tf.int64)


def _bytes(text: str) -> bytes:
  try:
    return text.encode('utf-8', 'surrogateescape')
  except UnicodeEncodeError:  # Half of an emoji, cut off behind "\ud83d".
    return text.encode('utf-8', 'surrogatepass')


def _wrong(where: str, number: int, value: Any, expected: str) -> ConfigError:
  found = _KINDS[type(value)]
  if isinstance(value, str | int | float):
    found += f' {value!r:.60}'
  return ConfigError(f'{where}: line {number} is {found}; expected {expected}')
