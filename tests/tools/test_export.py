"""`tools.export`: what it writes is what the run has, read by other means."""

import json
import os
import subprocess
import sys

import exported_run
import numpy as np
import pytest
import safetensors
from flax import traverse_util

from big_vision_dpn import weights
from tools.export.__main__ import main


def test_npz_has_big_visions_names(tmp_path, capsys):
  _, params = exported_run.make(tmp_path, patch_norm='none')
  assert main([str(tmp_path), '--to', 'npz']) == 0
  path = tmp_path / 'export/model.npz'
  assert capsys.readouterr().out == f'{path}\n'
  with np.load(path) as arrays:
    for name, array in traverse_util.flatten_dict(params, sep='/').items():
      np.testing.assert_array_equal(arrays[f'params/{name}'], array)
    assert len(arrays) == len(traverse_util.flatten_dict(params))


def test_a_scan_is_exported_block_by_block(tmp_path):
  _, params = exported_run.make(tmp_path / 'run', scan=True, patch_norm='dual')
  output = tmp_path / 'there' / 'b.npz'
  arguments = [str(tmp_path / 'run'), '--to', 'npz', '--output', str(output)]
  assert main(arguments) == 0
  names = traverse_util.flatten_dict(params, sep='/')
  arrays = weights.read(str(output))
  kernel = 'MlpBlock_0/Dense_0/kernel'
  for i in (0, 1):
    np.testing.assert_array_equal(
      arrays[f'Transformer/encoderblock_{i}/{kernel}'],
      names[f'Transformer/encoderblock/{kernel}'][i],
    )
  assert not any(
    name.startswith('Transformer/encoderblock/') for name in arrays
  )


_FRESH = """
import sys
import jax
import numpy as np

with open(sys.argv[1], 'rb') as file:
  model = jax.export.deserialize(bytearray(file.read()))
for n in (3, 1):
  out = model.call(np.load(sys.argv[2])[:n])
np.save(sys.argv[3], model.call(np.load(sys.argv[2])))
assert out.shape[0] == 1 and set(model.platforms) == {'cpu', 'cuda', 'tpu'}
assert not any(m.startswith('big_vision') for m in sys.modules)
"""


@pytest.mark.parametrize(
  'options',
  [
    {'patch_norm': 'dual', 'pool_type': 'tok', 'rep_size': True},
    {'pool_type': 'map', 'sublayer_norm': 'normformer', 'scan': True},
  ],
  ids=['dual', 'map'],
)
def test_stablehlo_runs_in_a_process_that_has_jax_alone(options, tmp_path):
  model, params = exported_run.make(tmp_path, **options)
  assert main([str(tmp_path), '--to', 'stablehlo']) == 0
  np.save(tmp_path / 'images.npy', exported_run.images())
  files = ['export/model.stablehlo', 'images.npy', 'logits.npy']
  subprocess.run(
    [sys.executable, '-c', _FRESH, *files],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    check=True,
  )
  np.testing.assert_allclose(
    np.load(tmp_path / 'logits.npy'),
    exported_run.logits(model, params),
    rtol=1e-5,
    atol=1e-5,
  )


def test_safetensors_has_torchs_layouts_and_the_model_beside_it(tmp_path):
  _, params = exported_run.make(tmp_path, patch_norm='dual')
  assert main([str(tmp_path), '--to', 'safetensors']) == 0
  assert (tmp_path / 'export/dual_patchnorm_vit.py').is_file()
  path = tmp_path / 'export/model.safetensors'
  with safetensors.safe_open(path, framework='numpy') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = json.loads(file.metadata()['model'])
  assert fields['image_size'] == [12, 18] and fields['patch_norm'] == 'dual'
  block = params['Transformer']['encoderblock_1']
  attention = block['MultiHeadDotProductAttention_0']
  expected = {
    'embedding.ln0.weight': params['embedding']['ln0']['scale'],
    'embedding.dense.weight': params['embedding']['dense']['kernel'].T,
    'blocks.1.norm2.bias': block['LayerNorm_1']['bias'],
    'blocks.1.mlp.fc1.weight': block['MlpBlock_0']['Dense_0']['kernel'].T,
    'blocks.1.attention.query.weight': attention['query']['kernel']
    .reshape(24, 24)
    .T,
    'blocks.1.attention.key.bias': attention['key']['bias'].reshape(24),
    'blocks.1.attention.out.weight': attention['out']['kernel']
    .reshape(24, 24)
    .T,
    'norm.weight': params['Transformer']['encoder_norm']['scale'],
    'posemb': params['pos_embedding'],
  }
  for name, array in expected.items():
    np.testing.assert_array_equal(tensors[name], array, err_msg=name)
  assert sum(t.size for t in tensors.values()) == sum(
    a.size for a in traverse_util.flatten_dict(params).values()
  )


def test_mistakes(tmp_path, capsys):
  assert main([str(tmp_path), '--to', 'npz']) == 2
  assert 'expected the WORKDIR of a run' in capsys.readouterr().err
  exported_run.make(tmp_path, sublayer_norm='subln')
  assert main([str(tmp_path), '--to', 'safetensors']) == 2
  assert "sublayer_norm='subln' has no torch model" in capsys.readouterr().err
  assert not (tmp_path / 'export').exists()
