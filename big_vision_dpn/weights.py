"""Weights: out of files, into a model's parameters, and into files.

Here weights are arrays by name, such as 'head/kernel'. What the names of a
model's older or foreign files mean is known to that model's `load`.
"""

import contextlib
import http.client
import os
import re
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tqdm
from flax import traverse_util

from big_vision_dpn import config

# What the parameters of a whole train state begin with, today and formerly.
_PREFIXES = ('params/', 'opt/target/')
_CHUNK = 1 << 20  # Bytes that are downloaded at a time.
_TIMEOUT = 60  # Seconds without an answer.


def read(source: str) -> dict[str, np.ndarray]:
  """The parameters in a file or in a run's checkpoint.

  Args:
    source: one of these, a file also as gs://, https:// or any address that
      TensorFlow reads:

        FILE.npz          a big_vision file: its arrays are named
                          'params/head/kernel', others beside them are left
                          out, or just 'head/kernel'
        FILE.safetensors  with the names that the file has
        WORKDIR           the newest checkpoint of a run
        WORKDIR/checkpoints/STEP

      Behind a colon, as in siglip.npz:img, what names must begin with; the
      others are left out, and it is taken off.

  Returns:
    Arrays by name, in the file's dtypes.

  Raises:
    ConfigError: nothing is there, it cannot be read, or no name begins so.
  """
  path, subtree = _split(source)
  if _is_folder(path):
    from big_vision_dpn import checkpoint  # Slow, and a file does without.

    arrays = checkpoint.read_params(path)
  else:
    with _local(path) as file:
      arrays = _read_file(file, path)
  for prefix in _PREFIXES:
    if any(name.startswith(prefix) for name in arrays):
      arrays = _below(prefix, arrays)
      break
  if not subtree:
    return arrays
  below = _below(f'{subtree}/', arrays) or _below(f'{subtree}.', arrays)
  if not below:
    tops = {re.split('[/.]', name)[0] for name in arrays}
    raise config.ConfigError(
      f'{path}: {config.unknown("subtree", subtree, tops)}'
    )
  return below


def _below(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }


def _split(source: str) -> tuple[str, str]:
  """Path and subtree. The colons of https:// and of a port are the path's."""
  match = re.fullmatch(r'(.+):((?!//|\d+/)[^:]+)', source)
  if not match or os.path.exists(source):
    return source, ''
  return match[1], match[2].strip('/')


def _is_web(path: str) -> bool:
  return path.startswith(('https://', 'http://'))


def _is_folder(path: str) -> bool:
  if '://' not in path:
    return os.path.isdir(path)
  return not _is_web(path) and _gfile().isdir(path)


def _gfile() -> Any:
  from tensorflow.io import gfile  # Seconds, and a local file does without.

  return gfile


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
  """A local file with the content of `path`, for as long as the context."""
  if '://' not in path:
    if not os.path.isfile(path):
      raise config.ConfigError(
        f'no file or folder {path!r}: weights are read from a .npz, a'
        ' .safetensors or the workdir of a run.'
      )
    yield path
    return
  with tempfile.NamedTemporaryFile() as file:
    _download(path, file)
    file.flush()
    yield file.name


def _download(path: str, file: Any) -> None:
  try:
    with _open_remote(path) as (remote, size):
      with tqdm.tqdm(
        desc=f'reading {os.path.basename(path)}',
        total=size,
        unit='B',
        unit_scale=True,
        delay=2,
        mininterval=5,
      ) as bar:
        while chunk := remote.read(_CHUNK):
          file.write(chunk)
          bar.update(len(chunk))
      if size is not None and file.tell() != size:
        raise OSError(f'it ended at byte {file.tell():,} of {size:,}')
  except (OSError, http.client.HTTPException) as e:
    raise config.ConfigError(f'cannot read {path}: {e}') from e


@contextlib.contextmanager
def _open_remote(path: str) -> Iterator[tuple[Any, int | None]]:
  """What has `read(bytes)`, and the number of its bytes if it is known."""
  if _is_web(path):
    with urllib.request.urlopen(path, timeout=_TIMEOUT) as response:
      size = response.headers.get('Content-Length')
      yield response, None if size is None else int(size)
    return
  import tensorflow as tf

  try:
    with _gfile().GFile(path, 'rb') as file:
      yield file, file.size()
  except tf.errors.OpError as e:
    raise OSError(e.message) from e


def _read_file(file: str, source: str) -> dict[str, np.ndarray]:
  """The arrays of an .npz or .safetensors; `source` is for messages."""
  try:
    if zipfile.is_zipfile(file):
      with np.load(file) as arrays:
        return {name: _restore_bfloat16(arrays[name]) for name in arrays.files}
    return safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, ValueError, OSError, EOFError,
          zipfile.BadZipFile) as e:  # fmt: skip
    raise config.ConfigError(
      f'{source!r} is no .npz and no .safetensors, or was cut short: {e}'
    ) from e


def _restore_bfloat16(array: np.ndarray) -> np.ndarray:
  # The .npy format has no name for bfloat16, so numpy writes two raw bytes.
  return array.view(jnp.bfloat16) if array.dtype == np.dtype('V2') else array


def write_npz(path: str, params: Mapping[str, Any]) -> None:
  """Writes parameters as big_vision does, named 'params/head/kernel'.

  Args:
    path: local or gs://; it is there whole or not at all.
    params: nested dict of arrays, or arrays by name.
  """
  gfile = _gfile()
  arrays = {
    f'params/{name}': np.asarray(array)
    for name, array in traverse_util.flatten_dict(params, sep='/').items()
  }
  with tempfile.TemporaryDirectory() as folder:
    local = os.path.join(folder, 'weights.npz')
    np.savez(local, **arrays)
    gfile.makedirs(os.path.dirname(path) or '.')
    gfile.copy(local, f'{path}.tmp', overwrite=True)
  gfile.rename(f'{path}.tmp', path, overwrite=True)


def merge_params(
  loaded: Mapping[str, np.ndarray],
  init_params: Mapping[str, Any],
  dont_load: Sequence[str] = (),
  source: str = 'the checkpoint',
  hints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Puts loaded arrays in the place of a model's initial ones.

  Args:
    loaded: arrays by name, such as 'head/kernel'.
    init_params: nested dict of the model's arrays, or of their shapes.
    dont_load: regexes; a parameter whose whole name matches one keeps its
      initial value, and is ignored if only the file has it.
    source: how an error calls the file.
    hints: what else an error says, by the parameter that does not fit.

  Returns:
    Nested dict like init_params, in its shapes and dtypes.

  Raises:
    ConfigError: a parameter is on one side only or differs in shape; lists
      every such parameter. Or dont_load has what is no regex, or matches none.
  """
  init = traverse_util.flatten_dict(init_params, sep='/')
  kept = _matching(dont_load, init.keys() | loaded.keys())
  wrong = {
    name
    for name in (init.keys() | loaded.keys()) - kept
    if name not in init
    or name not in loaded
    or init[name].shape != loaded[name].shape
  }
  if wrong:
    raise _mismatch(loaded, init, sorted(wrong), source, hints or {})
  merged = {
    name: a if name in kept else loaded[name].astype(a.dtype)
    for name, a in init.items()
  }
  return traverse_util.unflatten_dict(merged, sep='/')


def _matching(regexes: Sequence[str], names: set[str]) -> set[str]:
  """The names that one of the regexes matches whole."""
  matching = set()
  for regex in [regexes] if isinstance(regexes, str) else regexes:
    try:
      found = {name for name in names if re.fullmatch(regex, name)}
    except (re.error, TypeError) as e:
      raise config.ConfigError(
        f'dont_load: {regex!r} is no regular expression: {e}'
      ) from e
    if not found:
      raise config.ConfigError(
        f'dont_load: {regex!r} matches no parameter of the file or the model:'
        f' {", ".join(sorted(names))}'
      )
    matching |= found
  return matching


def _mismatch(
  loaded: Mapping[str, Any],
  init: Mapping[str, Any],
  wrong: Sequence[str],
  source: str,
  hints: Mapping[str, str],
) -> config.ConfigError:
  shape = lambda arrays, name: (
    tuple(arrays[name].shape) if name in arrays else 'missing'
  )
  lines = [
    f'  {name}: {shape(loaded, name)} in the file, {shape(init, name)} in the '
    'model'
    for name in wrong
  ]
  told = dict.fromkeys(hints[name] for name in wrong if name in hints)
  regexes = _cover(wrong, init.keys() | loaded.keys())
  return config.ConfigError(
    '\n'.join(
      [
        f'{source} does not fit the model:',
        *lines,
        *told,
        "Change the model; or, to keep the model's initial values and to"
        f' ignore what only the file has: dont_load={regexes}.',
      ]
    )
  )


def _cover(wrong: Sequence[str], names: set[str]) -> list[str]:
  """Regexes that match the wrong names, and none of the others."""
  regexes = []
  right = names - set(wrong)
  for name in wrong:
    parts = name.split('/')
    for n in range(1, len(parts)):
      prefix = '/'.join(parts[:n]) + '/'
      if not any(other.startswith(prefix) for other in right):
        regexes.append(f'{re.escape(prefix)}.*')
        break
    else:
      regexes.append(re.escape(name))
  return list(dict.fromkeys(regexes))
