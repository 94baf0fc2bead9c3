r"""Exports the newest checkpoint of a run.

    bash tools/run.sh tools.export WORKDIR --to npz
    bash tools/run.sh tools.export WORKDIR --to safetensors
    bash tools/run.sh tools.export WORKDIR --to stablehlo

WORKDIR/checkpoints/STEP is that checkpoint.

  npz          WORKDIR/export/model.npz, in big_vision's layout. Of a plain ViT
               without rep_size also timm reads it, which adds a position
               embedding for cls unless it is told not to:
                 vit = timm.models.VisionTransformer(no_embed_class=True, …)
                 vit.load_pretrained('model.npz')
  safetensors  model.safetensors, float32, and beside it dual_patchnorm_vit.py,
               a model in one file that needs torch alone:
                 model = DualPatchNormViT.from_safetensors('model.safetensors')
  stablehlo    model.stablehlo, with the weights in it, below 2 GB, for CPU,
               CUDA and TPU and any batch size; to be run by jax alone:
                 import jax
                 data = bytearray(open('model.stablehlo', 'rb').read())
                 logits = jax.export.deserialize(data).call(images)

The images are (n, height, width, channels) float32 for StableHLO, (n, channels,
height, width) for torch, of the size and in the range of the run's
preprocessing. Blocks of a scan are exported one by one.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
import tensorflow as tf
from einops import rearrange
from flax import traverse_util
from tensorflow.io import gfile

from big_vision_dpn import config as config_lib
from big_vision_dpn import preflight, weights
from big_vision_dpn.config import ConfigError
from big_vision_dpn.models.vit import ViT

TORCH_FILE = os.path.join(os.path.dirname(__file__), 'dual_patchnorm_vit.py')
# What a flatbuffer can hold, in bytes.
_MAX_STABLEHLO = 2_000_000_000


def read_config(run: str) -> ml_collections.ConfigDict:
  """The config that a run was started with.

  Raises:
    ConfigError: no run is there, or its config is damaged.
  """
  path = os.path.join(run, 'config.json')
  if not gfile.exists(path):
    runs = gfile.glob(os.path.join(run, '*', 'config.json'))
    found = ', '.join(sorted(map(os.path.dirname, runs)))
    raise ConfigError(
      f'no {path}: expected the WORKDIR of a run'
      + (f', such as {found}' if found else '')
    )
  with gfile.GFile(path) as file:
    text = file.read()
  try:
    return ml_collections.ConfigDict(json.loads(text), type_safe=False)
  except ValueError as e:
    raise ConfigError(f'{path} is no JSON: {e}; expected a config') from e


def read_params(source: str) -> dict[str, Any]:
  """A checkpoint's parameters, nested; the blocks of a scan one by one.

  Raises:
    ConfigError: see weights.read.
  """
  params = {}
  for name, array in weights.read(source).items():
    block = re.fullmatch(r'((?:.+/)?encoderblock)/(.+)', name)
    if block:
      stack, leaf = block.groups()
      params |= {f'{stack}_{i}/{leaf}': a for i, a in enumerate(array)}
    else:
      params[name] = array
  return traverse_util.unflatten_dict(params, sep='/')


def make_model(
  config: ml_collections.ConfigDict,
) -> tuple[ViT, tuple[int, int, int]]:
  """A run's model, without scan, and its image's shape, (h, w, c).

  Raises:
    ConfigError: it is no ViT, or the config lacks something that both need,
      such as a file of data that tells the image's size.
  """
  if config.model_name != 'vit':
    raise ConfigError(
      f'config.model_name is {config.model_name!r}; expected vit. Export it'
      ' --to npz'
    )
  config.model.scan = False
  # What is not needed must not be missed. A function is but a name in JSON.
  config.model_init, config.evals = None, {}
  names = config_lib.mixed_names(config)
  for data in (config.input, *(config.input[name] for name in names)):
    if 'pre_filter_fn' in data:
      data.pre_filter_fn = None
  plan = preflight.check(config)
  if not (plan.task and plan.batch_shapes):
    listed = '\n  '.join(plan.mistakes.messages)
    raise ConfigError(
      'to know the model and the size of its images, mend what the config'
      f' needs, or export --to npz, which does without:\n  {listed}'
    )
  return plan.task.model, plan.batch_shapes['image'].shape[1:]


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
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
  """The serialised function of images (n, *image) float32, for any n.

  Raises:
    ConfigError: the parameters are too large for such a file.
  """
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  if size > _MAX_STABLEHLO:
    raise ConfigError(
      f'the parameters are {size / 1e9:.1f} GB; expected at most'
      f' {_MAX_STABLEHLO / 1e9:.0f} GB in StableHLO. Export --to npz or'
      ' safetensors'
    )
  (n,) = jax.export.symbolic_shape('n')
  params = jax.tree.map(jnp.asarray, params)
  images = jax.ShapeDtypeStruct((n, *image), np.float32)
  predict = jax.jit(lambda images: model.apply({'params': params}, images)[0])
  export = jax.export.export(predict, platforms=('cpu', 'cuda', 'tpu'))
  return bytes(export(images).serialize())


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
  try:
    yield
  except (OSError, tf.errors.OpError) as e:
    raise ConfigError(
      f'cannot write {path}: {e}\nName another file by --output.'
    ) from e


def _write(path: str, data: bytes) -> None:
  with _writing(path):
    gfile.makedirs(os.path.dirname(path) or '.')
    with gfile.GFile(f'{path}.tmp', 'wb') as file:
      file.write(data)
    gfile.rename(f'{path}.tmp', path, overwrite=True)


def _export_npz(config: Any, params: Mapping[str, Any], path: str) -> None:
  del config  # The names say it all.
  with _writing(path):
    weights.write_npz(path, params)


def _export_safetensors(
  config: Any, params: Mapping[str, Any], path: str
) -> None:
  model, image = make_model(config)
  fields = json.dumps(torch_config(model, params, image))
  _write(path, safetensors.numpy.save(to_torch(params), {'model': fields}))
  with open(TORCH_FILE, 'rb') as file:
    name = os.path.basename(TORCH_FILE)
    _write(os.path.join(os.path.dirname(path), name), file.read())


def _export_stablehlo(
  config: Any, params: Mapping[str, Any], path: str
) -> None:
  model, image = make_model(config)
  _write(path, to_stablehlo(model, params, image))


FORMATS = {
  'npz': _export_npz,
  'safetensors': _export_safetensors,
  'stablehlo': _export_stablehlo,
}


def export(source: str, to: str, output: str | None = None) -> str:
  """Writes a file; returns its path.

  Args:
    source: WORKDIR or WORKDIR/checkpoints/STEP, local or gs://.
    to: a key of FORMATS.
    output: the file; None for WORKDIR/export/model.FORMAT.

  Raises:
    ConfigError: no run is there, its model has no such form, or the file
      cannot be written.
  """
  run = re.sub(r'/checkpoints/\d+/*$', '', source)
  path = output or os.path.join(run, 'export', f'model.{to}')
  FORMATS[to](read_config(run), read_params(source), path)
  return path


def main(argv: list[str] | None = None) -> int:
  """Exports; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='of a run, local or gs://')
  parser.add_argument('--to', choices=FORMATS, required=True)
  parser.add_argument('--output', help='default: WORKDIR/export/model.FORMAT')
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
