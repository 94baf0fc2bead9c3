"""Arrays in an .npz file, as `np.savez` writes it, held in memory."""

import os
import zipfile

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core

# What np.load raises for other files, damaged ones and empty ones.
_NO_NPZ = (
  tf.errors.OpError,
  zipfile.BadZipFile,
  EOFError,
  TypeError,
  ValueError,
)


def get(fname: str, split: str = 'all') -> core.Source:
  """The arrays of an .npz file: a feature each, one row an example.

  Args:
    fname: the file, local or gs://. An array called "SPLIT/FEATURE", as in
      np.savez(fname, **{'train/image': …, 'train/label': …, 'test/image': …}),
      is one of that split. Names without a slash make the one split "all".
    split: in TFDS's slicing language.

  Returns:
    The source. Features have the names and dtypes of the arrays; text becomes
    UTF-8 bytes. `id`, int64, is the place in the whole split, unless an array
    has that name. Images of numbers are decoded already: leave `decode` out.

  Raises:
    ConfigError: no such file or split; arrays of different lengths, or of what
      TensorFlow has no dtype for.
  """
  path = os.path.expanduser(fname)
  if not tf.io.gfile.exists(path):
    raise ConfigError(f'{path} does not exist; expected an .npz file')
  try:
    with tf.io.gfile.GFile(path, 'rb') as f, np.load(f) as arrays:
      return _source(arrays, path, split)
  except ConfigError:  # A ValueError too.
    raise
  except _NO_NPZ as e:
    raise ConfigError(
      f'{path} cannot be read as an .npz file, which np.savez writes: {e}'
    ) from e


def _source(arrays: np.lib.npyio.NpzFile, path: str, split: str) -> core.Source:
  members: dict[str, dict[str, str]] = {}
  for key in arrays.files:
    whole, _, feature = key.rpartition('/')
    members.setdefault(whole or 'all', {})[feature] = key
  if len(members) > 1 and any('/' not in key for key in arrays.files):
    raise ConfigError(
      f'{path} holds {", ".join(arrays.files)}; expected all names to be like'
      ' "train/image", or none of them'
    )
  # Only what the split needs is read and unpacked.
  wanted = {term.partition('[')[0].strip() for term in split.split('+')}
  tables = {
    name: {k: _array(arrays, key, path) for k, key in features.items()}
    for name, features in members.items()
    if name in wanted
  }
  sizes = dict.fromkeys(members, 0)
  sizes |= {name: _length(t, path, name) for name, t in tables.items()}
  terms = core.slice_split(split, sizes)
  for name, table in tables.items():
    table.setdefault('id', np.arange(sizes[name]))
  features = list(tables[terms[0][0]])
  for name, table in tables.items():
    if set(table) != set(features):
      raise ConfigError(
        f'{path}: {name} has the features {", ".join(sorted(table))}; expected'
        f' {", ".join(sorted(features))} as in {terms[0][0]}'
      )
  return core.from_tensors(
    f'npz {path} {split}',
    {
      key: _joined([tables[n][key][r.start : r.stop] for n, r in terms], key)
      for key in features
    },
  )


def _joined(parts: list[np.ndarray], key: str) -> np.ndarray:
  if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
    found = ' and '.join(f'{p.dtype}{list(p.shape[1:])}' for p in parts)
    raise ConfigError(
      f'{key!r} is {found} in the splits that are added; expected the same'
      ' dtype and shape'
    )
  return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _array(arrays: np.lib.npyio.NpzFile, key: str, path: str) -> np.ndarray:
  """An array of the file in a form that TensorFlow takes."""
  where = f'{path}: {key!r}'
  try:
    value = arrays[key]
  except (
    ValueError
  ) as e:  # An array of objects, which np.load will not unpickle.
    raise ConfigError(f'{where} cannot be read: {e}') from e
  if value.ndim == 0:
    raise ConfigError(f'{where} is a scalar; expected one value an example')
  if value.dtype.kind == 'U':
    return np.char.encode(value, 'utf-8').astype(object)
  if value.dtype.kind == 'S':
    return value.astype(object)
  try:
    tf.as_dtype(value.dtype)
  except TypeError as e:
    raise ConfigError(
      f'{where} is of dtype {value.dtype}; expected numbers, bools or text'
    ) from e
  return value


def _length(table: dict[str, np.ndarray], path: str, split: str) -> int:
  lengths = {key: len(value) for key, value in table.items()}
  if len(set(lengths.values())) > 1:
    found = ', '.join(f'{key} {n}' for key, n in lengths.items())
    raise ConfigError(
      f'{path}, split {split}: the arrays differ in length: {found}; expected'
      ' one row an example in each'
    )
  return next(iter(lengths.values()))
