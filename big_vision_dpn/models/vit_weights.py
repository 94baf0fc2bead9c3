"""A ViT's pretrained parameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from big_vision_dpn import weights


def load(
  init_params: Mapping[str, Any],
  init_file: str,
  model_cfg: Mapping[str, Any],
  dont_load: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads a ViT's parameters from a big_vision `.npz`.

  Position embeddings of another (square) grid are resampled, as for
  finetuning at another resolution.

  Args:
    init_params: nested dict of the model's initial arrays.
    init_file: a local `.npz`.
    model_cfg: the config's `model`; every model module's `load` is given it,
      this one needs nothing of it.
    dont_load: regexes over names such as 'head/kernel'; a parameter whose
      whole name matches one keeps its initial value.

  Returns:
    Nested dict like init_params, in its shapes and dtypes.

  Raises:
    ConfigError: no such file, or its parameters are not the model's; lists
      each one that is missing, unexpected or of another shape.
  """
  del model_cfg
  loaded = weights.read_npz(init_file)
  if 'pos_embedding' in loaded and 'pos_embedding' in init_params:
    loaded['pos_embedding'] = resample_posemb(
      loaded['pos_embedding'], init_params['pos_embedding'].shape[1]
    )
  return weights.merge_params(loaded, init_params, dont_load, init_file)


def resample_posemb(posemb: np.ndarray, length: int) -> np.ndarray:
  """Position embeddings of one square grid, bilinearly on another.

  The corners of the two grids coincide.

  Args:
    posemb: (1, old², width).
    length: new².

  Returns:
    (1, new², width) float32; `posemb` itself where the length is its own or
    one of the two is no square.
  """
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(length)
  if old == new or (old**2, new**2) != (posemb.shape[1], length):
    return posemb
  points = np.linspace(0, old - 1, new)[:, None]
  hats = np.maximum(0, 1 - np.abs(points - np.arange(old))).astype(np.float32)
  grid = rearrange(posemb.astype(np.float32), '1 (h w) d -> h w d', h=old)
  grid = np.einsum('ih,jw,hwd->ijd', hats, hats, grid, optimize=True)
  return rearrange(grid, 'h w d -> 1 (h w) d')
