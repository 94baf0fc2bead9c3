"""Every option of the ViT trains on real digits: a proof of minutes."""

import functools
import importlib.util
import pathlib

import pytest

from big_vision_dpn import comparison, preflight, train, writers

CONFIG = 'configs/proj/dpn/quickstart.py'
PLACES = ('pre', 'post', 'pre_post')
BFLOAT16 = {'dtype_mm': 'bfloat16', 'patch_norm': 'dual'}
OPTIONS = [
  *(
    {'patch_norm': norm}
    for norm in ('none', 'dual', 'pre', 'post', 'post_posemb')
  ),
  {'patch_norm': 'pre_post_posemb'},
  *(
    {'patch_norm': 'dual', 'patch_norm_type': norm_type}
    for norm_type in ('rmsnorm', 'only_learnable', 'no_learnable')
  ),
  *({'sa_norm': sa, 'mlp_norm': mlp} for sa in PLACES for mlp in PLACES),
  {'sa_norm': 'post', 'mlp_norm': 'post', 'post_norm_at': 'residual'},
  {'sublayer_norm': 'normformer'},
  {'sublayer_norm': 'subln'},
  {'stochastic_depth': 0.1, 'dropout': 0.1, 'patch_norm': 'dual'},
  {'scan': True, 'patch_norm': 'dual'},
  {'remat_policy': 'dots_saveable', 'patch_norm': 'dual'},
  BFLOAT16,
  {**BFLOAT16, 'scan': True},
  *({'pool_type': pool} for pool in ('map', 'tok', '0')),
  {'posemb': 'sincos2d', 'rep_size': True},
  {'patch_size': 4, 'patch_norm': 'dual'},
  {'patch_size': (14, 4), 'patch_norm': 'dual'},
]


@functools.cache
def _module():
  path = pathlib.Path(__file__).parents[2] / CONFIG
  spec = importlib.util.spec_from_file_location('quickstart', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_loss_falls(options, tmp_path):
  config = _module().get_config()
  config.model.update(patch_norm='none', depth=2, width=48, mlp_dim=96)
  with config.model.ignore_type():
    config.model.update(options)
  config.update(log_training_steps=100, ckpt_steps=300)
  del config.evals, config.comparison, config.total_epochs
  config.total_steps = 300
  (variant,) = comparison.variants(config, str(tmp_path))
  plan = preflight.check(variant.config)
  assert preflight.report_mistakes([plan], data_needed=True) == ''
  train.train(plan, 'run', str(tmp_path))
  first, *_, last = writers.read_metrics(str(tmp_path))
  # ln 10 at the start, of ten classes.
  assert first['training_loss'] == pytest.approx(2.3026, abs=1e-3)
  assert last['step'] == 300 and last['training_loss'] < 1.9
