"""Checkpoints of a run, by Orbax: asynchronous and atomic.

A working directory holds `config.json`, the config that it was started with,
and `checkpoints/STEP/`, the newest two and those kept for ever.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from tensorflow.io import gfile

from big_vision_dpn import config as config_lib
from big_vision_dpn import pytree, writers
from big_vision_dpn.config import ConfigError

_NEWEST_KEPT = 2
_CONFIG_FILE = 'config.json'


def _config_file(workdir: str) -> str:
  return os.path.join(workdir, _CONFIG_FILE)


def _absolute(path: str) -> str:
  return path if '://' in path else os.path.abspath(path)


def check_workdir(workdir: str, config: Any) -> None:
  """Raises ConfigError if `workdir` belongs to a run of another config.

  Fields that do not change a run's result may differ: evals, log_training, …
  """
  if not gfile.exists(_config_file(workdir)):
    return
  with gfile.GFile(_config_file(workdir)) as f:
    text = f.read()
  try:
    old = json.loads(text)
  except ValueError as e:
    raise ConfigError(f'{_config_file(workdir)} is no JSON: {e}') from e
  differences = config_lib.fixed_differences(
    old, config_lib.to_jsonable(config)
  )
  if differences:
    listed = '\n  '.join(differences)
    raise ConfigError(
      f'workdir {workdir} holds a run of another config:\n  {listed}\n'
      'Go on with that config, or choose another --workdir.'
    )


def write_config(workdir: str, config: Any) -> None:
  """Records the run's config, atomically, from the first process."""
  if jax.process_index() == 0:
    writers.write_json(workdir, _CONFIG_FILE, config_lib.to_jsonable(config))


class Checkpointer:
  """Saves and restores the training state of one working directory."""

  def __init__(self, workdir: str, keep_every: int | None = None):
    """Opens, or makes, the directory of checkpoints.

    Args:
      workdir: local or gs://.
      keep_every: checkpoints at multiples of these steps are never deleted.
    """
    self._directory = os.path.join(_absolute(workdir), 'checkpoints')
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_NEWEST_KEPT,
        keep_period=keep_every,
        cleanup_tmp_directories=True,
      ),
    )

  def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
    """Begins to save; the arrays may be donated as soon as it returns.

    Args:
      step: updates done.
      state: tree of jax.Arrays.
      extra: JSON's types, e.g. the clock's state.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
      ),
    )

  def restore_newest(self, target: Any) -> tuple[int, Any, dict] | None:
    """The newest checkpoint that is whole, or None if there is no checkpoint.

    Args:
      target: tree of jax.ShapeDtypeStruct with the shardings to restore to.

    Returns:
      (step, state, extra). A damaged checkpoint is reported and moved aside,
      to `damaged_checkpoints/`, and the one before it is taken.

    Raises:
      RuntimeError: there are checkpoints and every one is damaged. They stay
        where they are: a second start must not take the run for a new one.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            extra=ocp.args.JsonRestore(),
          ),
        )
      except Exception as e:  # Any damage, in whichever of Orbax's errors.
        logging.warning('Checkpoint %s/%d is damaged: %s',
                        self._directory, step, e)  # fmt: skip
        damaged.append(step)
        continue
      if damaged:
        self._move_aside(damaged)
      return step, restored.state, restored.extra
    if steps:
      raise RuntimeError(
        f'none of the checkpoints {steps} in {self._directory} can be read.'
        ' Start again in another workdir'
      )
    return None

  def _move_aside(self, steps: Sequence[int]) -> None:
    if jax.process_index() == 0:
      aside = os.path.join(
        os.path.dirname(self._directory), 'damaged_checkpoints'
      )
      gfile.makedirs(aside)
      for step in map(str, steps):
        moved = os.path.join(aside, step)
        if gfile.exists(moved):  # The same step was damaged before.
          gfile.rmtree(moved)
        gfile.rename(os.path.join(self._directory, step), moved)
    multihost_utils.sync_global_devices('damaged checkpoints moved aside')
    self._manager.reload()

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def read_params(folder: str) -> dict[str, np.ndarray]:
  """The parameters in a checkpoint, without its model, mesh or devices.

  Args:
    folder: WORKDIR, whose newest checkpoint it is, or
      WORKDIR/checkpoints/STEP; local or gs://.

  Returns:
    Arrays by name, such as 'head/kernel', in the checkpoint's dtypes.

  Raises:
    ConfigError: there is no checkpoint, or it is damaged.
  """
  folder = _absolute(folder)
  state = os.path.join(folder, 'state')
  if not gfile.isdir(state):
    checkpoints = os.path.join(folder, 'checkpoints')
    steps = gfile.isdir(checkpoints) and ocp.utils.checkpoint_steps(checkpoints)
    if not steps:
      raise ConfigError(
        f'no checkpoint in {folder}: expected the workdir of a run, or'
        ' WORKDIR/checkpoints/STEP'
      )
    state = os.path.join(checkpoints, str(max(steps)), 'state')
  handler = ocp.PyTreeCheckpointHandler()
  try:
    params = {'params': handler.metadata(epath.Path(state)).tree['params']}
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    restored = handler.restore(
      epath.Path(state),
      args=ocp.args.PyTreeRestore(
        item=params,
        restore_args=jax.tree.map(lambda _: as_numpy, params),
        partial_restore=True,
      ),
    )
  except Exception as e:  # Any damage, in whichever of Orbax's errors.
    raise ConfigError(
      f'the checkpoint {os.path.dirname(state)} is damaged: {e}\n'
      'Name another one, as WORKDIR/checkpoints/STEP.'
    ) from e
  return pytree.flatten_with_names(restored['params'])
