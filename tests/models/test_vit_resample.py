"""Position embeddings and patch kernels at another size."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from big_vision_dpn.models.vit_resample import resample_posemb, resize_kernel

SIZES = [
  ((3, 3), (7, 7)),
  ((7, 7), (3, 3)),
  ((4, 4), (2, 9)),
  ((5, 2), (5, 4)),
  ((1, 3), (4, 2)),
  ((6, 4), (1, 1)),
]


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_posemb_as_scipy_and_big_vision(old, new):
  grid = _normal(*old, 3)
  zoom = (new[0] / old[0], new[1] / old[1], 1)
  expected = scipy.ndimage.zoom(grid, zoom, order=1)
  resampled = resample_posemb(grid, new)
  assert resampled.dtype == np.float32
  np.testing.assert_allclose(resampled, expected, atol=1e-6)


@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_antialiased_posemb_as_jax(old, new):
  grid = _normal(*old, 3)
  expected = jax.image.resize(grid, (*new, 3), 'linear', antialias=True)
  resampled = resample_posemb(grid, new, antialias=True)
  assert resampled.dtype == np.float32
  np.testing.assert_allclose(resampled, expected, atol=2e-6)


def test_resampling_a_plane_gives_the_plane():
  def plane(h, w):
    axes = np.linspace(-1, 1, h), np.linspace(-1, 1, w)
    y, x = np.meshgrid(*axes, indexing='ij')
    return np.stack([y, x, 2 * x - 3 * y + 1], axis=-1).astype(np.float32)

  for old, new in (((2, 2), (7, 7)), ((7, 3), (3, 6)), ((14, 14), (24, 10))):
    resampled = resample_posemb(plane(*old), new)
    np.testing.assert_allclose(resampled, plane(*new), atol=1e-6)


def _resize(patches, size):
  return tf.image.resize(patches, size, method='bilinear').numpy()


def _embed(patches, kernel):
  return np.einsum('nhwc,hwcd->nd', patches, kernel)


@pytest.mark.parametrize(
  ('old', 'new'), [((2, 2), (4, 4)), ((4, 4), (7, 5)), ((3, 2), (4, 2))]
)
def test_growing_patches_are_embedded_as_before(old, new):
  patches, kernel = _normal(9, *old, 3), _normal(*old, 3, 5, seed=1)
  resized = resize_kernel(kernel, new)
  assert resized.shape == (*new, 3, 5)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(
    _embed(_resize(patches, new), resized),
    _embed(patches, kernel),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize(('old', 'new'), [((4, 4), (2, 2)), ((6, 5), (4, 2))])
def test_shrinking_patches_have_the_least_error(old, new):
  """Over white noise x, the error of ⟨Bx, w'⟩ is ‖Bᵀw' − w‖."""
  one = np.eye(old[0] * old[1], dtype=np.float32).reshape(-1, *old, 1)
  b = _resize(one, new).reshape(len(one), -1)  # Bᵀ
  kernel = _normal(*old, 1, 1)
  expected, *_ = np.linalg.lstsq(b, kernel.reshape(-1), rcond=None)
  resized = resize_kernel(kernel, new)
  np.testing.assert_allclose(resized.reshape(-1), expected, atol=1e-5)


def test_a_kernel_of_the_same_size_stays():
  kernel = _normal(4, 3, 3, 2)
  np.testing.assert_allclose(resize_kernel(kernel, (4, 3)), kernel, atol=1e-6)
