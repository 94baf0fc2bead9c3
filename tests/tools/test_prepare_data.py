"""`tools.prepare_data` without a network: what is there, and what cannot be."""

import sys

import pytest

from tools import prepare_data


def test_prepared_data_is_left_alone_and_listed(tiny_cifar10, capsys):
  assert prepare_data.main(['cifar10', f'--data_dir={tiny_cifar10}']) == 0
  assert 'cifar10: train 50, test 21 in' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('cifr10', "Did you mean 'cifar10'"),
    ('imagenet2012', 'ILSVRC2012_img_train.tar'),
    ('imagenet21k/winter21', 'winter21_whole.tar.gz'),
  ],
)
def test_mistakes(name, message, tmp_path, capsys):
  assert prepare_data.main([name, f'--data_dir={tmp_path}']) == 2
  assert message in capsys.readouterr().err


def test_one_failure_does_not_stop_the_others(tiny_cifar10, capsys):
  folder = f'--data_dir={tiny_cifar10}'
  assert prepare_data.main(['cifr10', 'cifar10', folder]) == 2
  assert 'cifar10: train 50, test 21' in capsys.readouterr().out


def test_beam_options_are_those_of_tfds_command_line():
  pytest.importorskip('apache_beam')
  from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    StandardOptions,
  )

  options = prepare_data.parse_beam_options(
    'DataflowRunner', 'project=p,region=r'
  )
  assert options.view_as(StandardOptions).runner == 'DataflowRunner'
  assert options.view_as(GoogleCloudOptions).project == 'p'
  assert options.view_as(GoogleCloudOptions).region == 'r'


def test_beam_options_without_beam(monkeypatch, capsys):
  for name in ('apache_beam', 'apache_beam.options.pipeline_options'):
    monkeypatch.setitem(sys.modules, name, None)
  assert prepare_data.parse_beam_options(None, None) is None
  assert prepare_data.main(['cifar10', '--beam_runner=FlinkRunner']) == 2
  assert 'pip install "apache-beam' in capsys.readouterr().err
