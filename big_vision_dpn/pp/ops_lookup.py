"""The op that maps strings to numbers by a file."""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, choose
from big_vision_dpn.pp.registry import register


@register('lookup', key='image')
def lookup(
  mapping: str, npzkey: str = 'fnames', sep: str | None = None
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Maps strings to int64 numbers by a file; one that it lacks becomes -1.

  A string tensor becomes an int64 one of its shape.

  Args:
    mapping: the file, local or gs://. A text file has one string a line, whose
      number is that of the line, from 0. A file that ends in ".npz" has an
      array of strings, whose numbers are their places in it.
    npzkey: the name of that array.
    sep: each line of the text file is a string, `sep`, and its number.

  Raises:
    ConfigError: no such file or array, a line that does not read, or a string
      with two numbers.
  """
  data = read_file(mapping, 'lookup')
  if mapping.endswith('.npz'):
    numbers = _number(mapping, enumerate(_npz_strings(mapping, data, npzkey)))
  elif sep is None:
    # Bytes have only \n and \r for line ends; a str would break at \x0b too.
    numbers = _number(mapping, enumerate(data.splitlines()))
  else:
    numbers = _number(mapping, _pairs(mapping, data, sep))
  with tf.init_scope():
    table = tf.lookup.StaticHashTable(
      tf.lookup.KeyValueTensorInitializer(
        tf.constant(list(numbers), tf.string),
        tf.constant(list(numbers.values()), tf.int64),
      ),
      default_value=-1,
      # So that it lives as long as the datasets that use it.
      experimental_is_anonymous=True,
    )
  return lambda x: table.lookup(tf.convert_to_tensor(x))


def read_file(path: str, op: str) -> bytes:
  """The content of a file that an op's argument names, local or remote.

  Raises:
    ConfigError: it cannot be read; the message has the path and the reason.
  """
  if not isinstance(path, str) or not path:
    raise ConfigError(f'expected the path of a file, got {path!r}')
  try:
    with tf.io.gfile.GFile(path, 'rb') as f:
      return f.read()
  except tf.errors.OpError as e:
    raise ConfigError(
      f'{op} cannot read {path!r}: {e.message}. Expected a file that exists;'
      ' correct the path, or put the file there'
    ) from e


def _npz_strings(mapping: str, data: bytes, npzkey: str) -> list[bytes]:
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      strings = choose(f'array in {mapping!r}, as npzkey,', npzkey, arrays)
  except (ValueError, OSError, zipfile.BadZipFile) as e:
    if isinstance(e, ConfigError):
      raise
    raise ConfigError(
      f'{mapping!r} is no .npz file that can be read ({e}); write it by'
      ' numpy.savez, the strings not as dtype object'
    ) from e
  if strings.ndim != 1 or strings.dtype.kind not in 'SU':
    raise ConfigError(
      f'array {npzkey!r} in {mapping!r} has shape {strings.shape} and dtype'
      f' {strings.dtype}; expected one row of strings'
    )
  return [tf.compat.as_bytes(s) for s in strings.tolist()]


def _pairs(mapping: str, data: bytes, sep: str) -> Iterator[tuple[int, bytes]]:
  if not isinstance(sep, str) or not sep:
    raise ConfigError(f'sep is what divides string and number, not {sep!r}')
  for place, line in enumerate(data.splitlines(), 1):
    string, found, number = line.rpartition(sep.encode())
    try:
      if not found:
        raise ValueError
      yield int(number), string
    except ValueError as e:
      raise ConfigError(
        f'line {place} of {mapping!r} is {line!r}; expected a string,'
        f' {sep!r} and a whole number'
      ) from e


def _number(
  mapping: str, pairs: Iterable[tuple[int, bytes]]
) -> dict[bytes, int]:
  numbers: dict[bytes, int] = {}
  for number, string in pairs:
    if numbers.setdefault(string, number) != number:
      raise ConfigError(
        f'{mapping!r} maps {string!r} to {numbers[string]} and to {number};'
        ' expected one number a string'
      )
  if not numbers:
    raise ConfigError(f'{mapping!r} is empty; expected strings to look up')
  return numbers
