"""A ViT's pretrained parameters: out of any file that holds some.

What a file names and lays out in another way is brought into big_vision's, and
then into the model's: its stem, its grid of patches, its blocks in a loop or in
a scan. Only what stays different does not fit.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from flax import traverse_util

from big_vision_dpn import weights
from big_vision_dpn.config import ConfigError
from big_vision_dpn.models import vit_foreign
from big_vision_dpn.models.vit_resample import resample_posemb, resize_kernel

Arrays = dict[str, np.ndarray]
Size = tuple[int, int]

_PLAIN, _DENSE = 'embedding', 'embedding/dense'
_BLOCK = re.compile(r'Transformer/encoderblock_(\d+)/(.+)')
_SCANNED = 'Transformer/encoderblock/'


def load(
  init_params: Mapping[str, Any],
  init_file: str,
  model_cfg: Mapping[str, Any],
  dont_load: Sequence[str] = (),
  *,
  image_size: Size | None = None,
  resize_patch: bool = False,
  posemb_antialias: bool = False,
  posemb_grid: Size | None = None,
) -> dict[str, Any]:
  """Reads a ViT's parameters.

  Files of big_vision, of today and of old, of AugReg and of our runs, of
  HuggingFace's ViT and of timm's (see vit_foreign for what differs) fit a model
  with any stem and with its blocks in a loop or in a scan. Position embeddings
  are resampled if the model's grid of patches is another one.

  Args:
    init_params: nested dict of the model's initial arrays or their shapes.
    init_file: see weights.read.
    model_cfg: the config's `model`, without num_classes.
    dont_load: regexes over names such as 'head/kernel'; a parameter whose
      whole name matches one keeps its initial value, and is ignored if only
      the file has it. LayerNorms of the stem that only one side has must be
      named: 'embedding/ln.*'.
    image_size: height and width of the model's images; None for a grid of
      patches that is square.
    resize_patch: resize the patches' kernel if the model's patches are of
      another size, see vit_resample.resize_kernel. In a stem with a LayerNorm
      on the patches, its scale and bias first go into the kernel and the bias
      behind it, which leaves the function as it is, and become 1 and 0. Then
      the file's patches must be square.
    posemb_antialias: see vit_resample.resample_posemb.
    posemb_grid: the file's grid of patches, rows and columns. None if it is
      the model's or square, in this order where the length allows both.

  Returns:
    Nested dict like init_params, in its shapes and dtypes.

  Raises:
    ConfigError: the file cannot be read, its parameters are not the model's
      (lists each one that is missing, unexpected or of another shape), or an
      option is not of its kind.
  """
  _check_options(resize_patch, posemb_antialias, posemb_grid)
  init = traverse_util.flatten_dict(init_params, sep='/')
  patch_size = _patch_size(init, model_cfg)
  grid = _grid(init, image_size, patch_size)
  loaded = _modernize(_read(init_file, init))
  loaded = _fit_stem(loaded, init, patch_size, resize_patch)
  loaded = _fit_posemb(loaded, grid, posemb_antialias, posemb_grid)
  loaded = _fit_blocks(loaded, init)
  hints = _hints(loaded, init, resize_patch)
  return weights.merge_params(loaded, init_params, dont_load, init_file, hints)


def _check_options(
  resize_patch: bool, posemb_antialias: bool, posemb_grid: Size | None
) -> None:
  options = {'resize_patch': resize_patch, 'posemb_antialias': posemb_antialias}
  for name, value in options.items():
    if not isinstance(value, bool):
      raise ConfigError(f'{name} is {value!r}; expected True or False')
  if posemb_grid is not None and not (
    isinstance(posemb_grid, list | tuple)
    and len(posemb_grid) == 2
    and all(isinstance(n, int) and n > 0 for n in posemb_grid)
  ):
    raise ConfigError(
      f'posemb_grid is {posemb_grid!r}; expected rows and columns of the'
      " file's grid of patches, such as (14, 14)"
    )


def _read(init_file: str, init: Mapping[str, Any]) -> Arrays:
  """The file's arrays in flax's names and layouts, float32."""
  arrays = {
    name: a.astype(np.float32, copy=False)
    for name, a in weights.read(init_file).items()
  }
  if not vit_foreign.is_foreign(arrays):
    return arrays
  heads = (a.shape[-2] for n, a in init.items() if n.endswith('query/kernel'))
  return vit_foreign.convert(arrays, next(heads, 1), init_file)


def _modernize(arrays: Arrays) -> Arrays:
  """Files of before big_vision's present names, with these names.

  The position embeddings had a module of their own, or were the encoder's; the
  pooling head had none; and before Linen, flax numbered all of a module's
  submodules in one sequence.
  """
  tree = _renumber(traverse_util.unflatten_dict(arrays, sep='/'))
  moved = {
    'Transformer/posembed_input/pos_embedding': 'pos_embedding',
    'Transformer/pos_embedding': 'pos_embedding',
  }
  if 'probe' in tree:
    parts = re.compile(
      'probe|(MultiHeadDotProductAttention|LayerNorm|MlpBlock)_0'
    )
    names = [name for name in tree if parts.fullmatch(name)]
    tree['MAPHead_0'] = {name: tree.pop(name) for name in names}
  return {
    moved.get(name, name): a
    for name, a in traverse_util.flatten_dict(tree, sep='/').items()
  }


def _renumber(tree: Any) -> Any:
  """LayerNorm_0, Attention_1, LayerNorm_2 -> LayerNorm_0, Attention_0, …_1."""
  if not isinstance(tree, dict):
    return tree
  matches = {name: re.fullmatch(r'(.+)_(\d+)', name) for name in tree}
  numbers = {name: int(m[2]) for name, m in matches.items() if m}
  tree = {name: _renumber(value) for name, value in tree.items()}
  # In Linen every class counts from 0, so that several have the same number.
  if len(set(numbers.values())) < len(numbers):
    return tree
  counts = collections.Counter()
  for name in sorted(numbers, key=numbers.get):
    kind = matches[name][1]
    value = tree.pop(name)
    tree[f'{kind}_{counts[kind]}'] = value
    counts[kind] += 1
  return tree


def _patch_size(init: Mapping[str, Any], model_cfg: Mapping[str, Any]) -> Size:
  """Of the model, in pixels."""
  if f'{_PLAIN}/kernel' in init:
    return init[f'{_PLAIN}/kernel'].shape[:2]
  from big_vision_dpn.models import vit  # Which imports this module.

  return vit.Model(None, **model_cfg).patch_size


def _grid(
  init: Mapping[str, Any], image_size: Size | None, patch_size: Size
) -> Size | None:
  """The model's grid of patches, None if it cannot be told."""
  if image_size:
    return (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
  if 'pos_embedding' in init:
    return _square(init['pos_embedding'].shape[1])
  return None


def _square(length: int) -> Size | None:
  side = math.isqrt(length)
  return (side, side) if length and side**2 == length else None


def _fit_stem(
  loaded: Arrays, init: Mapping[str, Any], patch_size: Size, resize: bool
) -> Arrays:
  """The kernel of the patches as the model's stem has it."""
  source, target = (
    _DENSE if f'{_DENSE}/kernel' in arrays else _PLAIN
    for arrays in (loaded, init)
  )
  if f'{source}/kernel' not in loaded or f'{target}/kernel' not in init:
    return loaded
  pixels = math.prod(init[f'{target}/kernel'].shape[:-1])
  channels = pixels // math.prod(patch_size)
  kernel = _as_patches(loaded[f'{source}/kernel'], patch_size, channels)
  bias = loaded.get(f'{source}/bias')
  moved = (f'{source}/kernel', f'{source}/bias')
  rest = {n: a for n, a in loaded.items() if n not in moved}
  if resize and kernel.ndim == 4 and kernel.shape[:2] != patch_size:
    if any(name.startswith('embedding/ln0/') for name in init):
      rest, kernel, bias = _fold_ln0(rest, kernel, bias, patch_size)
    kernel = resize_kernel(kernel, patch_size)
  if target == _DENSE:
    kernel = kernel.reshape(-1, kernel.shape[-1])
  fitted = {f'{target}/kernel': kernel, f'{target}/bias': bias}
  return rest | {n: a for n, a in fitted.items() if a is not None}


def _as_patches(
  kernel: np.ndarray, patch_size: Size, channels: int
) -> np.ndarray:
  """(hp, wp, c, width): the model's patch, or else a square; or as it was."""
  if kernel.ndim == 4:
    return kernel
  positions, rest = divmod(len(kernel), channels)
  same = positions == math.prod(patch_size)
  size = patch_size if same else _square(positions)
  if rest or not size:
    return kernel
  return kernel.reshape(*size, channels, kernel.shape[-1])


def _fold_ln0(
  arrays: Arrays,
  kernel: np.ndarray,
  bias: np.ndarray | None,
  patch_size: Size,
) -> tuple[Arrays, np.ndarray, np.ndarray | None]:
  """ln0's scale and bias moved into the dense, and its own 1 and 0.

  (γ x + β) W + b = x (γ W) + (β W + b).

  Returns:
    The arrays, with an ln0 for patches of `patch_size`; kernel; bias.
  """
  arrays, flat = dict(arrays), kernel.reshape(-1, kernel.shape[-1])
  new_shape = (math.prod(patch_size) * kernel.shape[2],)
  if (shift := arrays.get('embedding/ln0/bias')) is not None:
    bias = shift @ flat if bias is None else bias + shift @ flat
    arrays['embedding/ln0/bias'] = np.zeros(new_shape, np.float32)
  if (scale := arrays.get('embedding/ln0/scale')) is not None:
    flat = scale[:, None] * flat
    arrays['embedding/ln0/scale'] = np.ones(new_shape, np.float32)
  return arrays, flat.reshape(kernel.shape), bias


def _fit_posemb(
  loaded: Arrays, grid: Size | None, antialias: bool, file_grid: Size | None
) -> Arrays:
  """Position embeddings without a row for cls, and on the model's grid."""
  if 'pos_embedding' not in loaded:
    return loaded
  posemb = loaded['pos_embedding']
  length = posemb.shape[1]
  if file_grid and length - math.prod(file_grid) not in (0, 1):
    raise ConfigError(
      f'posemb_grid {tuple(file_grid)}: the file has {length} position'
      ' embeddings, one of them for cls perhaps'
    )
  old = tuple(file_grid) if file_grid else _guess_grid(length, grid)
  if not old:
    return loaded
  loaded = dict(loaded)
  if length > math.prod(old):  # Formerly cls got one as well.
    if 'cls' in loaded:
      loaded['cls'] = loaded['cls'] + posemb[:, :1]
    posemb = posemb[:, 1:]
  if grid and grid != old:
    posemb = rearrange(posemb, '1 (h w) d -> h w d', h=old[0])
    posemb = resample_posemb(posemb, grid, antialias)
    posemb = rearrange(posemb, 'h w d -> 1 (h w) d')
  return {**loaded, 'pos_embedding': posemb}


def _guess_grid(length: int, grid: Size | None) -> Size | None:
  """The grid of so many position embeddings; see load."""
  cells = math.prod(grid) if grid else None
  if length == cells:
    return grid
  guess = _square(length) or _square(length - 1)
  return grid if not guess and length - 1 == cells else guess


def _fit_blocks(loaded: Arrays, init: Mapping[str, Any]) -> Arrays:
  """Blocks in a scan have one name, and a leading axis; in a loop, numbers."""
  scan = any(name.startswith(_SCANNED) for name in init)
  fitted, layers = {}, collections.defaultdict(dict)
  for name, array in loaded.items():
    if scan and (match := _BLOCK.fullmatch(name)):
      layers[match[2]][int(match[1])] = array
    elif not scan and name.startswith(_SCANNED):
      rest = name.removeprefix(_SCANNED)
      for i, layer in enumerate(array):
        fitted[f'Transformer/encoderblock_{i}/{rest}'] = layer
    else:
      fitted[name] = array
  for rest, arrays in layers.items():
    whole = sorted(arrays) == list(range(len(arrays)))
    if whole and len({a.shape for a in arrays.values()}) == 1:
      fitted[_SCANNED + rest] = np.stack([arrays[i] for i in sorted(arrays)])
    else:  # A mismatch, layer by layer.
      fitted |= {
        f'Transformer/encoderblock_{i}/{rest}': a for i, a in arrays.items()
      }
  return fitted


def _hints(
  loaded: Mapping[str, Any], init: Mapping[str, Any], resize_patch: bool
) -> dict[str, str]:
  """What to do, by the name of a parameter that may not fit."""
  hints = {}
  if 'pos_embedding' in loaded and 'pos_embedding' in init:
    hints['pos_embedding'] = (
      'A grid of patches that is not square in the file is'
      ' posemb_grid=(rows, columns).'
    )
  if not resize_patch:
    names = ('kernel', 'dense/kernel', 'ln0/scale', 'ln0/bias')
    hints |= dict.fromkeys(
      [f'embedding/{name}' for name in names],
      'Patches of another size are resized by resize_patch=True.',
    )
  prefixes = ('embedding/ln', 'posemb_norm/')
  norms = {
    name for name in init.keys() ^ loaded.keys() if name.startswith(prefixes)
  }
  regexes = [
    f'{p}.*' for p in prefixes if any(name.startswith(p) for name in norms)
  ]
  text = (
    'Only one of the two has these LayerNorms of the stem: allow it by'
    f' dont_load={regexes}.'
  )
  return hints | dict.fromkeys(norms, text)
