"""Runs several processes joined by jax.distributed, for tests."""

import json
import os
import socket
import subprocess
import sys


def start(
  *arguments: str, processes: int, devices: int
) -> list[subprocess.Popen]:
  """Starts Python with these arguments in each of some processes.

  Args:
    *arguments: of the interpreter.
    processes: their number; a single one is not told that it is a job.
    devices: of each, on the CPU.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  # A cluster in which the tests themselves run is none of their business.
  env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
  env |= {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.path.dirname(os.path.dirname(__file__)),
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  if processes > 1:
    env |= {
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_COORDINATOR_BIND_ADDRESS': address,
      'JAX_NUM_PROCESSES': str(processes),
    }
  return [
    subprocess.Popen(
      [sys.executable, *arguments],
      env=env | ({'JAX_PROCESS_ID': str(i)} if processes > 1 else {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def run(*arguments: str, processes: int, devices: int) -> list[dict]:
  """Runs `start`ed processes to their end.

  Each prints one JSON object on a line, beside the libraries' own lines.

  Returns:
    What each process printed, by its number.
  """
  started = start(*arguments, processes=processes, devices=devices)
  try:
    outputs = [p.communicate(timeout=300) for p in started]
  finally:
    for p in started:
      p.kill()
  for p, (_, stderr) in zip(started, outputs, strict=True):
    assert p.returncode == 0, stderr
  lines = [[s for s in out.splitlines() if s[:1] == '{'] for out, _ in outputs]
  return [json.loads(line) for (line,) in lines]
