"""Exported weights in torch: our model, timm's, and other stems.

They need `pip install -e '.[test,torch]'`, and are skipped without.
"""

import importlib.util
import pathlib
import subprocess
import sys

import exported_run
import numpy as np
import pytest

from tools.export.__main__ import main

WORKER = pathlib.Path(__file__).with_name('torch_worker.py')
pytestmark = pytest.mark.skipif(
  not importlib.util.find_spec('torch'), reason='torch is not installed'
)


def _check(what, folder, expected, to):
  assert main([str(folder), '--to', to]) == 0
  np.save(folder / 'images.npy', exported_run.images())
  subprocess.run([sys.executable, WORKER, what, folder], check=True)
  actual, scale = np.load(folder / 'output.npy'), np.abs(expected).max()
  np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize(
  'options',
  [
    *(
      {'patch_norm': norm}
      for norm in ('none', 'dual', 'pre', 'post', 'post_posemb')
    ),
    {'patch_norm': 'pre_post_posemb', 'posemb': 'sincos2d'},
    *(
      {'patch_norm': 'dual', 'patch_norm_type': norm_type}
      for norm_type in ('rmsnorm', 'only_learnable', 'no_learnable')
    ),
    *({'pool_type': pool} for pool in ('map', 'tok', '0', 'none')),
    {'rep_size': True, 'patch_norm': 'dual', 'scan': True, 'mlp_dim': None},
    {'rep_size': 16, 'pool_type': 'tok'},
  ],
  ids=str,
)
def test_the_model_in_one_file(options, tmp_path):
  expected = exported_run.logits(*exported_run.make(tmp_path, **options))
  _check('one_file', tmp_path, expected, 'safetensors')


def test_timm_reads_the_npz_of_a_plain_vit(tmp_path):
  run = exported_run.make(tmp_path, patch_norm='none', pool_type='tok')
  _check('timm_npz', tmp_path, exported_run.logits(*run), 'npz')


@pytest.mark.parametrize('what', ['vit_pytorch_stem', 'timm_naflex_stem'])
def test_other_stems_are_the_same(what, tmp_path):
  model, params = exported_run.make(tmp_path, patch_norm='dual')
  out = model.apply({'params': params}, exported_run.images())[1]['stem']
  _check(what, tmp_path, np.asarray(out).reshape(3, 9, 24), 'npz')
