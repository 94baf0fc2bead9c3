"""Being told to end: a SIGTERM to any process of the run."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
  """A context in which SIGTERM does not end the process, but is noticed.

  With several processes it is jax's coordination service that catches it, and
  finds a step that none of them has passed.
  """

  def __init__(self):
    self._requested = False
    self._before = None

  def __enter__(self) -> 'Preemption':
    if jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def _notice(self, number: int, frame: FrameType | None) -> None:
    self._requested = True

  def requested(self, step: int) -> bool:
    """Whether the run is to end behind this step; all processes agree.

    Must be called for each step, by all of them.
    """
    if jax.process_count() == 1:
      return self._requested
    return multihost_utils.reached_preemption_sync_point(step)

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
