r"""Exports the newest checkpoint of a run.

    bash tools/run.sh tools.export WORKDIR --to npz
    bash tools/run.sh tools.export WORKDIR --to safetensors
    bash tools/run.sh tools.export WORKDIR --to stablehlo

  npz          WORKDIR/export/model.npz, in big_vision's layout; of a model
               without DPN also timm and open_clip read it.
  safetensors  model.safetensors, and beside it dual_patchnorm_vit.py, a model
               in one file that needs torch alone:
                 model = DualPatchNormViT.from_safetensors('model.safetensors')
  stablehlo    model.stablehlo, with the weights in it, for CPU, CUDA and TPU
               and any batch size; to be run by jax alone:
                 data = bytearray(open('model.stablehlo', 'rb').read())
                 logits = jax.export.deserialize(data).call(images)

The images are (n, height, width, channels) float32 for StableHLO, (n, channels,
height, width) for torch, of the size and in the range of the run's
preprocessing. Blocks of a scan are exported one by one.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
from einops import rearrange
from flax import traverse_util
from tensorflow.io import gfile

from big_vision_dpn import models, preflight, weights
from big_vision_dpn.config import ConfigError
from big_vision_dpn.models.vit import ViT

TORCH_FILE = os.path.join(os.path.dirname(__file__), 'dual_patchnorm_vit.py')
ENDINGS = {'npz': 'npz', 'safetensors': 'safetensors', 'stablehlo': 'stablehlo'}


def load_run(workdir: str) -> tuple[ViT, dict[str, Any], tuple[int, int, int]]:
  """Of a run the model, without scan; its newest parameters; the image's shape.

  Raises:
    ConfigError: no run is there, or no ViT's.
  """
  path = os.path.join(workdir, 'config.json')
  if not gfile.exists(path):
    raise ConfigError(f'no {path}: expected the WORKDIR of a run')
  with gfile.GFile(path) as file:
    config = ml_collections.ConfigDict(json.load(file), type_safe=False)
  if config.model_name != 'vit':
    raise ConfigError(f'{workdir}: model {config.model_name!r}; expected vit')
  config.model_init = None  # The run has its own weights.
  config.model.scan = False
  plan = preflight.check(config)
  if not plan.params_shapes:
    listed = '\n  '.join(plan.mistakes.messages)
    raise ConfigError(f'{path}: the model cannot be built:\n  {listed}')
  params = models.module('vit').load(
    plan.params_shapes, workdir, config.model.to_dict()
  )
  return plan.task.model, params, plan.batch_shapes['image'].shape[1:]


def to_torch(params: Mapping[str, Any], model: ViT) -> dict[str, np.ndarray]:
  """Parameters by the names and in the layouts of dual_patchnorm_vit.py."""
  tensors = {}
  for name, array in traverse_util.flatten_dict(params, sep='/').items():
    module, _, leaf = name.rpartition('/')
    attention = module.endswith(('/query', '/key', '/value', '/out'))
    if attention and leaf == 'kernel':
      pattern = 'h d o -> (h d) o' if '/out' in name else 'i h d -> i (h d)'
      array = rearrange(array, pattern)
    elif leaf == 'kernel':
      array = array.reshape(-1, array.shape[-1])
    elif attention:
      array = array.reshape(-1)
    if leaf == 'kernel':
      array = array.T
    tensors[_torch_name(name)] = np.ascontiguousarray(array, np.float32)
  return tensors


# (Ours, torch's), applied in this order.
_TORCH_NAMES = (
  ('Transformer/encoder_norm', 'norm'),
  ('Transformer/encoderblock_', 'blocks/'),
  ('MAPHead_0/LayerNorm_0', 'pool/norm'),
  ('MAPHead_0', 'pool'),
  ('LayerNorm_0', 'norm1'),
  ('LayerNorm_1', 'norm2'),
  ('MultiHeadDotProductAttention_0', 'attention'),
  ('MlpBlock_0/Dense_0', 'mlp/fc1'),
  ('MlpBlock_0/Dense_1', 'mlp/fc2'),
  ('pos_embedding', 'posemb'),
  ('embedding/kernel', 'embedding/dense/kernel'),
  ('embedding/bias', 'embedding/dense/bias'),
)


def _torch_name(name: str) -> str:
  for ours, theirs in _TORCH_NAMES:
    if name.startswith(ours) or f'/{ours}' in name:
      name = name.replace(ours, theirs)
  module, _, leaf = name.rpartition('/')
  leaf = {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)
  return (f'{module}/{leaf}' if module else leaf).replace('/', '.')


def torch_config(
  model: ViT, params: Mapping[str, Any], image: tuple[int, int, int]
) -> dict[str, Any]:
  """The arguments of torch's DualPatchNormViT.

  Raises:
    ConfigError: the blocks' LayerNorms are not those that it has.
  """
  for field in ('sa_norm', 'mlp_norm', 'sublayer_norm'):
    value = getattr(model, field)
    if value not in ('pre', 'none'):
      raise ConfigError(
        f'{field}={value!r} has no torch model: the blocks of'
        f' {os.path.basename(TORCH_FILE)} are pre-LN. StableHLO exports it.'
      )
  rep_size = params['pre_logits']['kernel'].shape[1] if model.rep_size else 0
  return {
    'image_size': image[:2],
    'channels': image[2],
    'patch_size': model.patch_size,
    'width': model.width,
    'depth': model.depth,
    'mlp_dim': model.mlp_dim or 4 * model.width,
    'num_heads': model.num_heads,
    'num_classes': model.num_classes or 0,
    'rep_size': rep_size,
    'posemb': model.posemb,
    'pool_type': model.pool_type,
    'patch_norm': model.patch_norm,
    'patch_norm_type': model.patch_norm_type,
  }


def to_stablehlo(
  model: ViT, params: Mapping[str, Any], image: tuple[int, int, int]
) -> bytes:
  """The serialised function of images (n, *image) float32, for any n."""
  (n,) = jax.export.symbolic_shape('n')
  params = jax.tree.map(jnp.asarray, params)
  images = jax.ShapeDtypeStruct((n, *image), np.float32)
  predict = jax.jit(lambda images: model.apply({'params': params}, images)[0])
  export = jax.export.export(predict, platforms=('cpu', 'cuda', 'tpu'))
  return bytes(export(images).serialize())


def _write(path: str, data: bytes) -> None:
  gfile.makedirs(os.path.dirname(path) or '.')
  with gfile.GFile(f'{path}.tmp', 'wb') as file:
    file.write(data)
  gfile.rename(f'{path}.tmp', path, overwrite=True)


def export(workdir: str, to: str, output: str | None = None) -> str:
  """Writes a file; returns its path.

  Args:
    workdir: of the run.
    to: one of ENDINGS.
    output: the file; None for WORKDIR/export/model.ENDING.

  Raises:
    ConfigError: no run is there, or its model has no such form.
  """
  model, params, image = load_run(workdir)
  path = output or os.path.join(workdir, 'export', f'model.{ENDINGS[to]}')
  if to == 'npz':
    weights.write_npz(path, params)
  elif to == 'stablehlo':
    _write(path, to_stablehlo(model, params, image))
  else:
    config = json.dumps(torch_config(model, params, image))
    tensors = to_torch(params, model)
    _write(path, safetensors.numpy.save(tensors, {'model': config}))
    with open(TORCH_FILE, 'rb') as file:
      beside = os.path.join(os.path.dirname(path), os.path.basename(TORCH_FILE))
      _write(beside, file.read())
  return path


def main(argv: list[str] | None = None) -> int:
  """Exports; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='of a run, local or gs://')
  parser.add_argument('--to', choices=ENDINGS, required=True)
  parser.add_argument('--output', help='default: WORKDIR/export/model.ENDING')
  args = parser.parse_args(argv)
  # Else the attention would be that of this machine's accelerator alone.
  jax.config.update('jax_platforms', 'cpu')
  try:
    print(export(args.workdir, args.to, args.output))
  except ConfigError as e:
    print(e, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
