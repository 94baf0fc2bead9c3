"""Reads ImageNet's tars of tars in place, so that nothing is unpacked.

A release is one tar of a terabyte whose members are tars, one a synset. As the
outer one is not compressed, a synset is a range of its bytes: an index made
once lets any worker read any synset.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf

from big_vision_dpn.config import ConfigError

_SYNSET_TAR = re.compile(r'(n\d{8})\.tar')


class Synset(NamedTuple):
  """The tar of one synset.

  Attributes:
    wnid: its WordNet id, e.g. "n01440764".
    path: the file that holds it.
    offset: where in the file it starts, in bytes.
    size: its length in bytes; None: up to the end of the file.
  """

  wnid: str
  path: str
  offset: int = 0
  size: int | None = None


class _Range(io.RawIOBase):
  """A range of a file's bytes, local or remote, as a file of its own."""

  def __init__(self, path: str, offset: int = 0, size: int | None = None):
    super().__init__()
    self._file = tf.io.gfile.GFile(path, 'rb')
    self._start = offset
    self._size = self._file.size() - offset if size is None else size
    self._position = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = {
      os.SEEK_SET: 0,
      os.SEEK_CUR: self._position,
      os.SEEK_END: self._size,
    }
    self._position = start[whence] + offset
    return self._position

  def readinto(self, buffer: memoryview) -> int:
    n = min(len(buffer), self._size - self._position)
    if n <= 0:
      return 0
    self._file.seek(self._start + self._position)
    data = self._file.read(n)
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _members(file: io.BufferedReader, name: str) -> Iterator[tarfile.TarInfo]:
  """The files in a tar, whose bytes the caller may read from `file`.

  Raises:
    ConfigError: no tar, or one that ends early. Python's tarfile alone takes a
      tar cut between two members for a whole one.
  """
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      for member in tar:
        if member.isfile():
          yield member
      file.seek(tar.offset)
      complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
  except tarfile.TarError as e:
    raise ConfigError(f'{name} is no complete tar: {e}') from e
  if not complete:
    raise ConfigError(f'{name} is no complete tar: it has no end mark')


def index(path: str) -> list[Synset]:
  """The synsets in a tar of tars, found by reading its headers alone.

  Args:
    path: an uncompressed tar, local or remote (gs://).

  Raises:
    ConfigError: no tar, or one that was cut off.
  """
  synsets = []
  with io.BufferedReader(_Range(path), tarfile.BLOCKSIZE) as file:
    for member in _members(file, path):
      if match := _SYNSET_TAR.fullmatch(os.path.basename(member.name)):
        synset = Synset(match[1], path, member.offset_data, member.size)
        synsets.append(synset)
  return synsets


def in_folder(folder: str) -> list[Synset]:
  """The per-synset tars in a folder, or in the folders right below it."""
  paths = tf.io.gfile.glob([f'{folder}/*.tar', f'{folder}/*/*.tar'])
  return [
    Synset(match[1], path)
    for path in sorted(paths)
    if (match := _SYNSET_TAR.fullmatch(os.path.basename(path)))
  ]


def images(synset: Synset) -> Iterator[tuple[str, bytes]]:
  """The files of a synset: name without folders, content as it is stored.

  Raises:
    ConfigError: its tar is broken or was cut off.
  """
  name = f'{synset.wnid} of {synset.path}'
  window = _Range(synset.path, synset.offset, synset.size)
  with io.BufferedReader(window, 1 << 20) as file:
    for member in _members(file, name):
      file.seek(member.offset_data)
      content = file.read(member.size)
      if len(content) < member.size:
        raise ConfigError(f'{name} ends within {member.name}')
      yield os.path.basename(member.name), content


def is_image(content: bytes) -> bool:
  """Whether TensorFlow decodes it, to the last pixel, as pp's `decode` does."""
  try:
    tf.io.decode_image(content, channels=3, expand_animations=False)
  except tf.errors.InvalidArgumentError:
    return False
  return True
