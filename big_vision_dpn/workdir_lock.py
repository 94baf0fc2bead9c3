"""Two runs in one working directory would write over each other's files."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

import jax

from big_vision_dpn.config import ConfigError

NAME = 'in_use'


@contextlib.contextmanager
def locked(workdir: str | None) -> Iterator[None]:
  """Holds the directory, which is made if need be, for the time of the context.

  The first process of a run holds it, and the system lets go of it when that
  process ends in whatever way. Only local directories can be held; of gs:// and
  the like it is not known who else writes there.

  Raises:
    ConfigError: another run holds it, or it cannot be written to.
  """
  if not workdir or '://' in workdir or jax.process_index():
    yield
    return
  path = os.path.join(workdir, NAME)
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(path, 'a+')  # noqa: SIM115 Closed below.
  except OSError as e:
    raise ConfigError(f'--workdir: cannot write to {workdir}: {e}') from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      file.seek(0)
      raise ConfigError(
        f'--workdir: {workdir} is in use by {file.read().strip() or "a run"}.'
        ' End it, or choose another --workdir.'
      ) from e
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
