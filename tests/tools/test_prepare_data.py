"""`tools.prepare_data` without a network: what is there, and what cannot be."""

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
  ],
)
def test_mistakes(name, message, tmp_path, capsys):
  assert prepare_data.main([name, f'--data_dir={tmp_path}']) == 2
  assert message in capsys.readouterr().err


def test_one_failure_does_not_stop_the_others(tiny_cifar10, capsys):
  folder = f'--data_dir={tiny_cifar10}'
  assert prepare_data.main(['cifr10', 'cifar10', folder]) == 2
  assert 'cifar10: train 50, test 21' in capsys.readouterr().out
