"""Position embeddings for another grid, patch kernels for another patch.

Both are linear and separable: a matrix along the rows, one along the columns.
"""

import numpy as np


def resample_posemb(
  grid: np.ndarray, size: tuple[int, int], antialias: bool = False
) -> np.ndarray:
  """Position embeddings of one grid, bilinearly on another.

  Args:
    grid: (h, w, width).
    size: the new h and w.
    antialias: take a position for the middle of a patch, and stretch the hats
      where the grid shrinks, as `jax.image.resize` and torch's `interpolate(…,
      antialias=True)` do. Otherwise the corners of the two grids coincide, as
      in big_vision.

  Returns:
    (*size, width) float32.
  """
  rows, columns = (
    _centred(old, new, antialias=True)
    if antialias
    else _hats(np.linspace(0, old - 1, new), old)
    for old, new in zip(grid.shape[:2], size, strict=True)
  )
  grid = np.einsum('ih,jw,hwd->ijd', rows, columns, grid, optimize=True)
  return grid.astype(np.float32)


def resize_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A patch kernel for patches of another size (PI-resize).

  With B the matrix that resizes a patch bilinearly, w' = pinv(Bᵀ) w. Where
  patches grow, ⟨Bx, w'⟩ = ⟨x, w⟩ for every patch x; where they shrink, the
  error over patches of white noise is the least.

  Source: Beyer et al., FlexiViT, https://arxiv.org/abs/2212.08013, section 3.4.

  Args:
    kernel: (hp, wp, c, width).
    size: the new hp and wp.

  Returns:
    (*size, c, width) float32.
  """
  # The pseudo-inverse of a Kronecker product is that of its factors.
  rows, columns = (
    np.linalg.pinv(_centred(old, new).T)
    for old, new in zip(kernel.shape[:2], size, strict=True)
  )
  kernel = np.einsum('ih,jw,hwcd->ijcd', rows, columns, kernel, optimize=True)
  return kernel.astype(np.float32)


def _centred(old: int, new: int, antialias: bool = False) -> np.ndarray:
  """(new, old): interpolates what stands for the middles of equal intervals."""
  points = (np.arange(new) + 0.5) * old / new - 0.5
  return _hats(points, old, max(1.0, old / new) if antialias else 1.0)


def _hats(points: np.ndarray, old: int, reach: float = 1.0) -> np.ndarray:
  """(points, old): weights that fall to 0 at a distance of `reach`, sum 1."""
  distance = np.abs(points[:, None] - np.arange(old))
  hats = np.maximum(0, 1 - distance / reach)
  return hats / hats.sum(axis=1, keepdims=True)
