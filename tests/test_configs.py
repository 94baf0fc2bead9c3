"""Every config: it passes the checks without data, and trains with it."""

import importlib.util
import pathlib

import numpy as np
import PIL.Image
import pytest

from big_vision_dpn import comparison, preflight, train, writers
from big_vision_dpn import config as config_lib
from big_vision_dpn.config import ConfigError

FOLDER = pathlib.Path(__file__).parents[1] / 'configs' / 'proj' / 'dpn'


def _config(name, arg=''):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def _use_folder(config, folder):
  for data in (config.input.data, *(e.data for e in config.evals.values())):
    if data.name != 'bv:mnist5k':
      data.data_dir = folder


I1K = ('Ti/16', 'S/16', 'S/32', 'B/16', 'B/32', 'L/16')


@pytest.mark.parametrize(
  ('name', 'arg'),
  [
    ('quickstart', ''),
    ('quickstart', 'epochs=1,seed=2'),
    ('cifar10', ''),
    ('cifar10', 'patch_norm=none,seed=1,epochs=5'),
    ('vit_i1k', 'runlocal'),
    ('image_folder', 'runlocal'),
    *(('vit_i1k', f'variant={v},patch_norm=dual') for v in I1K),
    ('vit_i1k', 'patch_norm=none'),
  ],
)
def test_a_config_has_no_mistakes_without_its_data(name, arg, tmp_path):
  config = _config(name, arg)
  _use_folder(config, str(tmp_path))
  for variant in comparison.variants(config, str(tmp_path / 'workdir')):
    plan = preflight.check(variant.config)
    assert plan.mistakes.messages == []
    embedded = name == 'quickstart' or 'runlocal' in arg
    assert bool(plan.missing) != embedded


def test_all_configs_are_tested_here():
  names = {path.stem for path in FOLDER.glob('*.py')}
  assert names == {'quickstart', 'cifar10', 'image_folder', 'vit_i1k'}


def test_imagenet_recipe_has_the_facts_of_the_paper():
  config = config_lib.resolve(_config('vit_i1k', 'S/16'))
  assert config.input.batch_size == 4096
  assert config.total_epochs == 300
  assert config.lr == 1e-3
  assert config.wd == 1e-4
  assert config.grad_clip_norm == 1.0
  assert config.optax_name == 'scale_by_adam'
  assert config.schedule.to_dict() == {
    'decay_type': 'cosine',
    'warmup_steps': 10_000,
  }


@pytest.mark.parametrize(
  ('variant', 'randaug', 'mixup'),
  [
    ('Ti/16', '(2, 0)', 0.0),
    ('S/32', '(2, 15)', 0.2),
    ('S/16', '(2, 15)', 0.5),
    ('B/32', '(2, 15)', 0.5),
    ('B/16', '(2, 15)', 0.5),
    ('L/16', '(2, 15)', 0.5),
  ],
)
def test_imagenet_augmentation_by_model(variant, randaug, mixup):
  config = _config('vit_i1k', f'variant={variant}')
  assert f'randaug{randaug}' in config.input.pp
  assert config.mixup.p == mixup


def _train(config, workdir, **fields):
  config.update(fields)
  plan = preflight.check(config)
  assert preflight.report_mistakes([plan], data_needed=True) == ''
  train.train(plan, 'run', str(workdir))
  return writers.read_metrics(str(workdir))[-1]


def test_imagenet_recipe_trains(tmp_path):
  config = _config('vit_i1k', 'variant=Ti/16,runlocal')
  config.model.depth = 1
  config.schedule.warmup_steps = 1
  last = _train(config, tmp_path, total_steps=2)
  # 1000 sigmoids that begin at -6.9: the loss is 1000 log(1 + e^-6.9) + 6.9.
  assert last['training_loss'] == pytest.approx(7.9, abs=0.1)
  assert 0 <= last['val/prec@1'] <= 1


def test_cifar10_trains(tmp_path, tiny_cifar10):
  config = _config('cifar10', 'runlocal')
  _use_folder(config, tiny_cifar10)
  config.input.data.split = 'train'
  config.evals.test.data.split = 'test'
  config.model.depth = 1
  last = _train(config, tmp_path, total_steps=3)
  assert last['test/prec@1'] * 21 == pytest.approx(
    round(last['test/prec@1'] * 21)
  )


def test_a_folder_of_images_trains(tmp_path, capsys):
  for name in (
    'train/a/1.png',
    'train/a/2.jpg',
    'train/b/3.PNG',
    'val/b/4.png',
  ):
    path = tmp_path / 'data' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (300, 200) if name < 'val' else (256, 270)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(noise).save(path)
  (tmp_path / 'data/train/c').mkdir()
  (tmp_path / 'data/train/c/5.jpg').write_bytes(b'no image')
  config = _config(
    'image_folder', f'data_dir={tmp_path / "data"},variant=Ti/16,runlocal'
  )
  assert config.num_classes == 3
  config.model.depth = 1
  last = _train(config, tmp_path / 'workdir', total_steps=2)
  assert np.isfinite(last['training_loss'])
  assert 'train/c/5.jpg cannot be read' in capsys.readouterr().out


def test_a_folder_of_images_needs_the_folder(tmp_path):
  with pytest.raises(ConfigError, match='data_dir is missing'):
    _config('image_folder')
  with pytest.raises(ConfigError, match='there is no folder'):
    _config('image_folder', f'data_dir={tmp_path}/no')
