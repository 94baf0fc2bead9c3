"""Where a run's metrics go: metrics.jsonl, TensorBoard, the terminal."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from tensorflow.io import gfile

from big_vision_dpn.chrono import format_seconds


def note(text: str) -> None:
  """Prints a line, from the first process only."""
  if jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def write_json(workdir: str, name: str, value: Any) -> str:
  """Writes WORKDIR/NAME, whole or not at all; returns its path."""
  path = os.path.join(workdir, name)
  gfile.makedirs(workdir)
  with gfile.GFile(path + '.tmp', 'w') as f:
    f.write(json.dumps(value, indent=2) + '\n')
  gfile.rename(path + '.tmp', path, overwrite=True)
  return path


class DummyWriter:
  """Writes nothing: for a run without a workdir, and all but one process."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    pass

  def close(self) -> None:
    pass


class MetricsWriter:
  """Writes metrics.jsonl and TensorBoard event files into the workdir.

  metrics.jsonl has one flat JSON object a line: `step`, then the metrics of
  that step by name. A run that goes on after step n drops the lines behind n,
  which it will write again: no gap, no second line for a step.
  """

  def __init__(self, workdir: str, first_step: int):
    """Opens the files, with the lines up to `first_step` kept."""
    from clu import metric_writers

    self._path = os.path.join(workdir, 'metrics.jsonl')
    kept = [r for r in read_metrics(workdir) if r['step'] <= first_step]
    temporary = self._path + '.tmp'
    with gfile.GFile(temporary, 'w') as f:
      f.write(''.join(json.dumps(record) + '\n' for record in kept))
    gfile.rename(temporary, self._path, overwrite=True)
    self._file = gfile.GFile(self._path, 'a')
    self._tensorboard = metric_writers.SummaryWriter(
      os.path.join(workdir, 'tensorboard')
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    metrics = {name: float(value) for name, value in metrics.items()}
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    self._file.flush()
    self._tensorboard.write_scalars(step, metrics)
    self._tensorboard.flush()

  def close(self) -> None:
    self._file.close()
    self._tensorboard.close()


def make(workdir: str | None, first_step: int) -> MetricsWriter | DummyWriter:
  """The writer of this process for a run that begins behind `first_step`."""
  if workdir and jax.process_index() == 0:
    return MetricsWriter(workdir, first_step)
  return DummyWriter()


def read_metrics(workdir: str) -> list[dict[str, Any]]:
  """The records of a workdir's metrics.jsonl, in order.

  A last line that was cut off by a kill is left out. Without a file: [].
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  if not gfile.exists(path):
    return []
  with gfile.GFile(path) as f:
    lines = f.read().split('\n')
  return [json.loads(line) for line in lines[:-1]]


class Progress:
  """A progress bar on a terminal, plain lines with the time left elsewhere."""

  def __init__(self, name: str, first_step: int, total_steps: int):
    self._name, self._total_steps = name, total_steps
    self._bar = None
    if jax.process_index() == 0 and sys.stdout.isatty():
      self._bar = tqdm.tqdm(
        desc=name,
        total=total_steps,
        initial=first_step,
        file=sys.stdout,
        unit='step',
        dynamic_ncols=True,
      )

  def step(self) -> None:
    if self._bar is not None:
      self._bar.update()

  def report(
    self, step: int, metrics: Mapping[str, float], seconds_left: float | None
  ) -> None:
    """Shows loss, learning rate, speed, and on plain lines the time left."""
    shown = {
      'loss': f'{metrics["training_loss"]:.4f}',
      'lr': f'{metrics["lr"]:.3g}',
      'img/s': f'{metrics["img/sec"]:.0f}',
    }
    if self._bar is not None:
      self._bar.set_postfix(shown)
      return
    values = '  '.join(f'{key} {value}' for key, value in shown.items())
    note(
      f'{self._name}  step {step}/{self._total_steps}'
      f' ({step / self._total_steps:.0%})  {values}'
      f'  left {format_seconds(seconds_left)}'
    )

  def report_results(self, step: int, results: Mapping[str, float]) -> None:
    """Shows the metrics of an evaluator."""
    values = '  '.join(f'{key} {value:.4f}' for key, value in results.items())
    note(f'{self._name}  step {step}  {values}')

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
