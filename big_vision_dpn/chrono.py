"""Time: durations in config, when to act, and how fast a run is."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from big_vision_dpn.config import DURATION_UNITS, ConfigError


def steps(
  prefix: str,
  config: Mapping[str, Any],
  *,
  batch_size: int | None = None,
  data_size: int | None = None,
  total_steps: int | None = None,
  default: int | None = None,
) -> int | None:
  """Converts a duration of a config to steps, as big_vision does.

  Args:
    prefix: the duration's name, e.g. "warmup".
    config: holds at most one of PREFIX_steps, PREFIX_examples, PREFIX_epochs
      and PREFIX_percent (of the run, 0 to 1).
    batch_size: examples a step.
    data_size: examples an epoch.
    total_steps: steps of the run.
    default: the result when the config holds none of them.

  Returns:
    Steps, rounded; at least 1 unless the duration is 0.

  Raises:
    ConfigError: several units given, a negative duration, or one that needs a
      size that is not known.
  """
  given = [f'{prefix}_{u}' for u in DURATION_UNITS]
  given = [key for key in given if config.get(key) is not None]
  if not given:
    return default
  if len(given) > 1:
    raise ConfigError(f'give one of {", ".join(given)}, not several')
  (key,), unit = given, given[0].removeprefix(f'{prefix}_')
  value = config[key]
  if value < 0 or (unit == 'percent' and value > 1):
    raise ConfigError(f'{key}={value}: expected 0 or more, percent up to 1')
  known = {
    'steps': (1, 1),
    'examples': (1, batch_size),
    'epochs': (data_size, batch_size),
    'percent': (total_steps, 1),
  }
  times, per = known[unit]
  if times is None or per is None:
    size = 'length of the run' if unit == 'percent' else 'size of the data set'
    raise ConfigError(
      f'{key}={value}: the {size} is not known; prepare the data, or give'
      f' {prefix}_steps'
    )
  return max(1, round(value * times / per)) if value else 0


def itstime(
  step: int,
  every: int | None,
  total_steps: int,
  *,
  first: bool = False,
  last: bool = True,
) -> bool:
  """Whether an action that is due every `every` steps is due at `step`.

  As in big_vision: the last step always acts (unless `last` is False), and a
  step within a quarter of the period before it does not. `first` adds step 1.
  """
  if not every:
    return False
  if step == total_steps:
    return last
  if first and step == 1:
    return True
  return step % every == 0 and total_steps - step >= every / 4


class Chrono:
  """Measures a run: speed, progress and the time that is left.

  Time spent in `paused` parts (evaluation, checkpoints) does not count as
  training time. `state` and `restore` carry it over an interruption.
  """

  def __init__(
    self, *, first_step: int, total_steps: int, batch_size: int, devices: int
  ):
    self._total_steps, self._batch_size = total_steps, batch_size
    self._devices = devices
    self._tick_step, self._tick_time = first_step, time.monotonic()
    self._train_seconds = 0.0
    # Not known before the second tick: the first step waits for the compiler.
    self._seconds_a_step: float | None = None
    self._ticks = 0

  def state(self) -> dict[str, float]:
    """What a checkpoint keeps, as JSON's types."""
    return {'train_seconds': self._train_seconds}

  def restore(self, state: Mapping[str, float] | None) -> None:
    """Goes on from the `state` of an earlier process, if there was one."""
    if state:
      self._train_seconds = float(state['train_seconds'])

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock for the time of a `with` block."""
    start = time.monotonic()
    yield
    self._tick_time += time.monotonic() - start

  def tick(self, step: int) -> dict[str, float]:
    """Metrics of the steps since the last tick, by big_vision's names."""
    now = time.monotonic()
    seconds, done = now - self._tick_time, step - self._tick_step
    self._tick_step, self._tick_time = step, now
    self._train_seconds += seconds
    self._ticks += 1
    if self._ticks > 1:
      self._seconds_a_step = seconds / done
    images_a_second = done * self._batch_size / seconds
    return {
      'img/sec': images_a_second,
      'img/sec/core': images_a_second / self._devices,
      'core_hours': self._train_seconds * self._devices / 3600,
      'examples_seen': step * self._batch_size,
      'progress': step / self._total_steps,
    }

  def seconds_left(self, step: int) -> float | None:
    """Training time to the last step, at the speed of the last tick."""
    if self._seconds_a_step is None:
      return None
    return (self._total_steps - step) * self._seconds_a_step


class StepTrace:
  """A profiler trace of some steps, into WORKDIR/profile."""

  def __init__(self, steps: Sequence[int] | None, workdir: str | None):
    """`steps`: the first and the last; without them or a workdir, no trace."""
    self._first, self._last = steps if steps and workdir else (None, None)
    self._folder = os.path.join(workdir or '', 'profile')
    self._running = False

  def begin(self, step: int) -> None:
    """To be called before each step."""
    if self._first and self._first <= step <= self._last and not self._running:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def end(self, step: int, result: Any) -> None:
    """To be called behind each step, with arrays that it computes."""
    if self._running and step >= self._last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Writes the trace if it still runs: the run was shorter."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False


def format_seconds(seconds: float | None) -> str:
  """E.g. "2h05m", "3m20s", "9s"; "?" when not known."""
  if seconds is None:
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'
