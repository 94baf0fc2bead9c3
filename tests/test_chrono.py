"""Durations against arithmetic, and when an action is due."""

import pytest

from big_vision_dpn import chrono
from big_vision_dpn.config import ConfigError

SIZES = {'batch_size': 100, 'data_size': 1000, 'total_steps': 400}


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    ({'x_steps': 7}, 7),
    ({'x_examples': 1049}, 10),
    ({'x_examples': 1051}, 11),
    ({'x_examples': 1}, 1),
    ({'x_epochs': 2.5}, 25),
    ({'x_percent': 0.1}, 40),
    ({'x_percent': 0}, 0),
    ({'x_steps': None}, None),
    ({'y_steps': 3}, None),
  ],
)
def test_steps(config, expected):
  assert chrono.steps('x', config, **SIZES) == expected


@pytest.mark.parametrize(
  'config',
  [{'x_steps': 1, 'x_epochs': 1}, {'x_steps': -1}, {'x_percent': 10}],
)
def test_steps_mistakes(config):
  with pytest.raises(ConfigError):
    chrono.steps('x', config, **SIZES)


def test_epochs_need_the_size_of_the_data():
  with pytest.raises(ConfigError, match='x_epochs=2'):
    chrono.steps('x', {'x_epochs': 2}, batch_size=8)


@pytest.mark.parametrize(
  ('every', 'total', 'kw', 'expected'),
  [
    (10, 35, {}, [10, 20, 30, 35]),
    # 30 is within a quarter of the period of the last step.
    (10, 32, {}, [10, 20, 32]),
    (10, 30, {}, [10, 20, 30]),
    (10, 35, {'last': False}, [10, 20, 30]),
    (10, 35, {'first': True}, [1, 10, 20, 30, 35]),
    (100, 35, {}, [35]),
    (None, 35, {}, []),
    (0, 35, {}, []),
  ],
)
def test_itstime(every, total, kw, expected):
  due = [
    s for s in range(1, total + 1) if chrono.itstime(s, every, total, **kw)
  ]
  assert due == expected


def test_clock_counts_steps_not_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(chrono.time, 'monotonic', lambda: now[0])
  clock = chrono.Chrono(first_step=0, total_steps=40, batch_size=8, devices=2)
  now[0] = 100.0
  clock.tick(1)
  assert clock.seconds_left(1) is None  # The first step includes compilation.
  now[0] = 105.0
  with clock.paused():
    now[0] = 1105.0
  now[0] = 1110.0
  metrics = clock.tick(11)
  assert metrics['img/sec'] == 10 * 8 / 10
  assert metrics['img/sec/core'] == 10 * 8 / 10 / 2
  assert metrics['core_hours'] == 110 * 2 / 3600
  assert metrics['examples_seen'] == 88
  assert clock.seconds_left(11) == 29
  other = chrono.Chrono(first_step=11, total_steps=40, batch_size=8, devices=2)
  other.restore(clock.state())
  now[0] += 10
  assert other.tick(12)['core_hours'] == 120 * 2 / 3600


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(None, '?'), (9.4, '9s'), (200, '3m20s'), (7500, '2h05m')],
)
def test_format_seconds(seconds, text):
  assert chrono.format_seconds(seconds) == text
