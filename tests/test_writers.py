"""metrics.jsonl, TensorBoard's files, and what the terminal shows."""

import json
import math
import struct

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

from big_vision_dpn import writers


def _write(workdir, first_step, records):
  writer = writers.make(str(workdir), first_step)
  for step, metrics in records:
    writer.write(step, metrics)
  writer.close()


def _lines(workdir):
  return (workdir / 'metrics.jsonl').read_text().splitlines()


def _steps(workdir):
  return [json.loads(line)['step'] for line in _lines(workdir)]


def _bits(value):
  return struct.pack('d', value)


def test_lines_are_flat_json_in_full_precision(tmp_path):
  metrics = {
    'training_loss': np.float32(0.1),
    'val/prec@1': 1 / 3,
    'lr': 5e-324,  # The smallest double.
    'img/sec': np.nextafter(1e4, 2e4),
    'zero': -0.0,
    'integer': np.int32(7),
    'array': np.float32([2.5])[0],
  }
  _write(tmp_path, 0, [(1, metrics), (20, {'training_loss': 0.5})])
  first, second = map(json.loads, _lines(tmp_path))
  assert list(first) == ['step', *metrics]
  assert first.pop('step') == 1
  assert {k: _bits(v) for k, v in first.items()} == {
    k: _bits(v) for k, v in metrics.items()
  }
  assert second == {'step': 20, 'training_loss': 0.5}


def test_nan_and_infinity_survive(tmp_path):
  values = {'a': math.nan, 'b': math.inf, 'c': -math.inf}
  _write(tmp_path, 0, [(1, values)])
  _write(tmp_path, 1, [(2, values)])  # The first line is read and rewritten.
  records = writers.read_metrics(str(tmp_path))
  assert [r['step'] for r in records] == [1, 2]
  for record in records:
    assert math.isnan(record['a'])
    assert (record['b'], record['c']) == (math.inf, -math.inf)


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  """A kill must not take the metrics since the last checkpoint along."""
  writer = writers.make(str(tmp_path), 0)
  writer.write(3, {'x': 1.0})
  assert _steps(tmp_path) == [3]
  writer.close()


@pytest.mark.parametrize(
  ('first_step', 'kept'),
  [(0, []), (5, []), (10, [10]), (25, [10, 20]), (40, [10, 20, 30])],
)
def test_going_on_drops_the_lines_that_will_come_again(
  tmp_path, first_step, kept
):
  _write(tmp_path, 0, [(s, {'x': s / 3}) for s in (10, 20, 30)])
  before = _lines(tmp_path)
  steps = [s for s in (10, 20, 30, 40, 50) if s > first_step]
  _write(tmp_path, first_step, [(s, {'x': s / 3}) for s in steps])
  assert _steps(tmp_path) == kept + steps
  assert _lines(tmp_path)[: len(kept)] == before[: len(kept)]


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
  _write(tmp_path, 0, [(s, {'x': 1 / 3}) for s in (10, 20, 30)])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-cut])
  records = writers.read_metrics(str(tmp_path))
  assert records == [{'step': s, 'x': 1 / 3} for s in (10, 20)]
  # Behind step 30, so only the damage takes the line away.
  _write(tmp_path, 30, [(40, {'x': 2.0})])
  assert _steps(tmp_path) == [10, 20, 40]


def test_without_a_file_there_are_no_metrics(tmp_path):
  assert writers.read_metrics(str(tmp_path)) == []


def test_tensorboard_has_the_values(tmp_path):
  curve = {1: 2.5, 20: 1 / 3, 40: 0.125}
  _write(tmp_path, 0, [(s, {'loss': v}) for s, v in curve.items()])
  _write(tmp_path, 40, [(60, {'loss': 0.1, 'val/prec@1': 0.75})])
  events = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()

  def read(tag):
    return {
      e.step: float(tf.make_ndarray(e.tensor_proto))
      for e in events.Tensors(tag)
    }

  expected = {s: float(np.float32(v)) for s, v in {**curve, 60: 0.1}.items()}
  assert read('loss') == expected
  assert read('val/prec@1') == {60: 0.75}


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writer = writers.make(None, 0)
  writer.write(1, {'x': 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


METRICS = {'training_loss': 1.23456, 'lr': 0.00034567, 'img/sec': 1234.56}


@pytest.mark.parametrize(
  ('step', 'seconds_left', 'expected'),
  [
    (50, 7500, ['step 50/200 (25%)', 'left 2h05m']),
    (4, None, ['step 4/200 (2%)', 'left ?']),
    (200, 0, ['step 200/200 (100%)', 'left 0s']),
  ],
)
def test_progress_in_plain_lines(capsys, step, seconds_left, expected):
  progress = writers.Progress('dpn', 0, 200)
  progress.step()  # Says nothing by itself where there is no bar.
  assert capsys.readouterr().out == ''
  progress.report(step, METRICS, seconds_left)
  progress.close()
  out, err = capsys.readouterr()
  assert err == ''
  assert out.startswith('dpn  step')
  assert out.count('\n') == 1 and out.endswith('\n')
  always = ['loss 1.2346', 'lr 0.000346', 'img/s 1235']
  for part in always + expected:
    assert part in out


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr('sys.stdout.isatty', lambda: True)
  progress = writers.Progress('dpn', 10, 200)
  for _ in range(40):
    progress.step()
  progress.report(50, METRICS, 7500)
  progress.close()
  last = capsys.readouterr().out.split('\r')[-1]
  assert '50/200' in last and ' 25%' in last
  assert 'loss=1.2346' in last and 'img/s=1235' in last


def test_notes_are_printed_as_they_are(capsys):
  writers.note('two\nlines')
  assert capsys.readouterr().out == 'two\nlines\n'
