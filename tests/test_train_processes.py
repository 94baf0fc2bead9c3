"""A run of two processes with FSDP, told to end, and its resume."""

import json
import signal
import time

import numpy as np
import pytest
import several_processes
from test_train import FSDP, TINY

from big_vision_dpn import train, weights, writers

CONFIG = TINY.replace(
  '  return c\n', f"  c.sharding_strategy = [('.*', {FSDP!r})]\n  return c\n"
)


@pytest.fixture
def arguments(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return ['-m', 'big_vision_dpn.train', '--config', str(path), '--workdir']


def _wait(processes, codes):
  try:
    outputs = [p.communicate(timeout=200) for p in processes]
  finally:
    for p in processes:
      p.kill()
  found = [p.returncode for p in processes]
  assert found == codes, [stderr[-3000:] for _, stderr in outputs]


def test_two_processes_agree_on_the_step_at_which_they_end(arguments, tmp_path):
  def start(workdir, processes, devices):
    return several_processes.start(
      *arguments, str(workdir), processes=processes, devices=devices
    )

  cut, whole = tmp_path / 'cut', tmp_path / 'whole'
  processes = start(cut, 2, 1)
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline and processes[0].poll() is None:
    records = writers.read_metrics(str(cut))
    if records and records[-1]['step'] >= 8:
      break
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)  # To one of them alone.
  _wait(processes, [train.PREEMPTED] * 2)
  saved = max(int(p.name) for p in (cut / 'checkpoints').iterdir())
  assert 8 <= saved < 24

  _wait(start(cut, 2, 1), [0, 0])
  _wait(start(whole, 1, 2), [0])
  steps, losses = [], []
  for workdir in (cut, whole):
    records = writers.read_metrics(str(workdir))
    steps.append([r['step'] for r in records])
    losses.append([r['training_loss'] for r in records])
  assert steps[0] == steps[1] == [1, *range(2, 25, 2)]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
  expected = weights.read(str(whole))
  for name, array in weights.read(str(cut)).items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6)
  assert json.loads((cut / 'config.json').read_text())['seed'] == 3
