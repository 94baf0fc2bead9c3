"""Weights: reading them from files, and into a model's parameters."""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from big_vision_dpn import config


def read_npz(path: str) -> dict[str, np.ndarray]:
  """The parameters in a big_vision `.npz`, by name, such as 'head/kernel'.

  Args:
    path: a local file; its arrays are named 'params/head/kernel', other
      arrays beside them are left out, or just 'head/kernel'.

  Raises:
    ConfigError: no such file, or not an .npz.
  """
  if not os.path.isfile(path):
    raise config.ConfigError(
      f'no file {path!r}: weights are read from a local .npz.'
    )
  if not zipfile.is_zipfile(path):
    raise config.ConfigError(f'{path!r} is no .npz, or was cut short.')
  with np.load(path) as file:
    arrays = {name: _restore_bfloat16(file[name]) for name in file.files}
  prefix = 'params/'
  if not any(name.startswith(prefix) for name in arrays):
    return arrays
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }


def _restore_bfloat16(array: np.ndarray) -> np.ndarray:
  # The .npy format has no name for bfloat16, so numpy writes two raw bytes.
  return array.view(jnp.bfloat16) if array.dtype == np.dtype('V2') else array


def merge_params(
  loaded: Mapping[str, np.ndarray],
  init_params: Mapping[str, Any],
  dont_load: Sequence[str] = (),
  source: str = 'the checkpoint',
) -> dict[str, Any]:
  """Puts loaded arrays in the place of a model's initial ones.

  Args:
    loaded: arrays by name, such as 'head/kernel'.
    init_params: nested dict of the model's arrays.
    dont_load: regexes; a parameter whose whole name matches one keeps its
      initial value, and is ignored if only the file has it.
    source: how an error calls the file.

  Returns:
    Nested dict like init_params, in its shapes and dtypes.

  Raises:
    ConfigError: a parameter is on one side only or differs in shape; lists
      every such parameter.
  """
  regexes = [dont_load] if isinstance(dont_load, str) else dont_load
  init = traverse_util.flatten_dict(init_params, sep='/')
  names = {
    name
    for name in sorted(init.keys() | loaded.keys())
    if not any(re.fullmatch(regex, name) for regex in regexes)
  }
  _check_fit(
    {name: a.shape for name, a in loaded.items() if name in names},
    {name: a.shape for name, a in init.items() if name in names},
    source,
  )
  merged = {
    name: loaded[name].astype(a.dtype) if name in names else a
    for name, a in init.items()
  }
  return traverse_util.unflatten_dict(merged, sep='/')


def _check_fit(
  loaded: Mapping[str, tuple], init: Mapping[str, tuple], source: str
) -> None:
  wrong = sorted(
    name
    for name in init.keys() | loaded.keys()
    if init.get(name) != loaded.get(name)
  )
  if wrong:
    lines = [
      f'  {name}: {loaded.get(name, "missing")} in the file, '
      f'{init.get(name, "missing")} in the model'
      for name in wrong
    ]
    raise config.ConfigError(
      '\n'.join([f'{source} does not fit the model:', *lines])
      + '\nChange the model, or keep its initial values (and ignore what only '
      'the file has) by naming the parameters in dont_load, a list of regexes '
      f'such as {wrong[0].split("/")[0] + ".*"!r}.'
    )
