"""Variants of one config, and the report on their runs."""

import json

import matplotlib
import ml_collections
import numpy as np
import pytest
from PIL import Image

from big_vision_dpn import comparison
from big_vision_dpn.config import ConfigError

FIELDS = {
  'lr': 0.1,
  'wd': None,
  'model': {'patch_size': 4, 'patch_norm': 'none'},
  'evals': {'val': {'type': 'classification', 'log_steps': 5}},
}


def _config(runs, **fields):
  config = ml_collections.ConfigDict(FIELDS)
  config.comparison = {'runs': runs, 'metric': 'val/prec@1', **fields}
  return config


def test_a_config_without_a_comparison_is_one_run():
  config = ml_collections.ConfigDict(FIELDS)
  (variant,) = comparison.variants(config, 'somewhere')
  assert variant.config is config
  assert variant.workdir == 'somewhere'


def test_each_run_has_the_fields_but_its_own():
  runs = [
    ('z', {'model': {'patch_norm': 'dual'}, 'lr': 1}),
    ('baseline', {}),
    # Of another type than in the config; a field that it lacks.
    ('a', {'model': {'patch_size': (2, 2), 'width': 8}, 'wd': 0.5, 'seed': 1}),
  ]
  config = _config(runs, next_steps='…')
  before = config.to_json()
  variants = comparison.variants(config, 'gs://bucket/w')
  assert [v.name for v in variants] == ['z', 'baseline', 'a']
  assert [v.config.to_dict() for v in variants] == [
    {**FIELDS, 'lr': 1, 'model': {'patch_size': 4, 'patch_norm': 'dual'}},
    FIELDS,
    {
      **FIELDS,
      'wd': 0.5,
      'seed': 1,
      'model': {'patch_size': (2, 2), 'patch_norm': 'none', 'width': 8},
    },
  ]
  assert [v.workdir for v in variants] == [
    'gs://bucket/w/z',
    'gs://bucket/w/baseline',
    'gs://bucket/w/a',
  ]

  # Neither the config nor another variant changes with one of them.
  variants[0].config.evals.val.log_steps = 7
  variants[0].config.model.patch_size = 9
  assert config.to_json() == before
  assert variants[1].config.to_dict() == FIELDS


@pytest.mark.parametrize(
  ('runs', 'fields', 'message'),
  [
    ([], {}, 'needs runs'),
    ([('a', {})], {'metric': ''}, 'needs runs'),
    (
      [('a', {})],
      {'metrics': 'x'},
      "unknown argument of comparison 'metrics'. Did you mean 'metric'?",
    ),
    ([('a', {}), ('b', {}), ('a', {'lr': 1})], {}, 'a name twice: a, b, a'),
    (['ab'], {}, "runs has 'ab'; expected (name, fields)"),
    ([('a', 'lr=3')], {}, "runs has ('a', 'lr=3'); expected (name, fields)"),
    ([('a',)], {}, "runs has ('a',); expected"),
    ({'ab': {'lr': 3}}, {}, "runs has 'ab'; expected"),
  ],
)
def test_mistakes(runs, fields, message):
  with pytest.raises(ConfigError) as e:
    comparison.variants(_config(runs, **fields), 'workdir')
  assert message in str(e.value)


def test_without_a_workdir_the_runs_have_none():
  variants = comparison.variants(_config([('a', {}), ('b', {})]), None)
  assert [v.workdir for v in variants] == [None, None]


@pytest.mark.parametrize('metric', ['val/prec1', 'loss'])
def test_a_metric_that_is_not_measured(metric):
  config = ml_collections.ConfigDict({'comparison': {'metric': metric}})
  comparison.check_metric(ml_collections.ConfigDict(), [])
  with pytest.raises(ConfigError, match=f'unknown metric {metric!r}'):
    comparison.check_metric(config, ['val/prec@1', 'val/loss'])


SPEC = {
  'runs': [('dpn', {}), ('baseline', {})],
  'metric': 'val/prec@1',
  'next_steps': 'Next: more epochs.',
}
CURVES = {
  'dpn': [
    {'step': 1, 'training_loss': 2.3},
    {'step': 10, 'training_loss': 0.9, 'val/prec@1': 0.5},
    {'step': 20, 'training_loss': 0.25, 'val/prec@1': 0.8125},
  ],
  'baseline': [
    {'step': 1, 'training_loss': 2.4},
    {'step': 10, 'training_loss': 1.1, 'val/prec@1': 0.75},
    {'step': 20, 'val/prec@1': 0.625},
    # Cut off by a kill.
    {'step': 25, 'training_loss': 0.5},
  ],
}


def _write(workdir, curves):
  for name, records in curves.items():
    (workdir / name).mkdir()
    text = ''.join(json.dumps(record) + '\n' for record in records)
    (workdir / name / 'metrics.jsonl').write_text(text)
  return str(workdir)


def test_report_prints_the_last_value_of_each_run(tmp_path, capsys):
  comparison.report(SPEC, _write(tmp_path, CURVES))
  lines = [line for line in capsys.readouterr().out.splitlines() if line]
  assert [line.split() for line in lines[:3]] == [
    ['val/prec@1', 'training_loss'],
    ['dpn', '0.8125', '0.2500'],
    ['baseline', '0.6250', '0.5000'],
  ]
  # A column's values end under the end of its title.
  assert len({len(line) for line in lines[:3]}) == 1
  assert str(tmp_path / 'comparison.png') in lines[3]
  assert lines[4] == 'Next: more epochs.'


def test_report_draws_a_curve_of_each_run(tmp_path):
  comparison.report(SPEC, _write(tmp_path, CURVES))
  image = Image.open(tmp_path / 'comparison.png')
  assert image.format == 'PNG'
  pixels = np.asarray(image.convert('RGB')).reshape(-1, 3)
  colors = matplotlib.rcParams['axes.prop_cycle'].by_key()['color']
  for color, drawn in zip(colors[:3], [True, True, False], strict=True):
    rgb = np.round(255 * np.array(matplotlib.colors.to_rgb(color)))
    assert (pixels == rgb).all(axis=1).any() == drawn


@pytest.mark.parametrize('missing', ['metric', 'file'])
def test_report_without_a_metric(tmp_path, missing):
  curves = {
    'dpn': CURVES['dpn'],
    'baseline': CURVES['baseline'][:1] if missing == 'metric' else [],
  }
  workdir = _write(tmp_path, curves)
  if missing == 'file':
    (tmp_path / 'baseline' / 'metrics.jsonl').unlink()
  name = 'val/prec@1' if missing == 'metric' else 'training_loss'
  with pytest.raises(ConfigError, match=f"measured '{name}'"):
    comparison.report(SPEC, workdir)
