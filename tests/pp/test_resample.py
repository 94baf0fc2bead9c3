"""Resizing by weights, against TensorFlow's, and windows of it."""

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.pp.resample import METHODS, Resized

methods = pytest.mark.parametrize('method', METHODS)
SIZES = [
  ((37, 53), (20, 31)),
  ((37, 53), (70, 101)),
  ((37, 53), (11, 100)),
  ((24, 36), (12, 12)),
  ((1, 1), (5, 7)),
  ((5, 7), (1, 1)),
  ((2, 900), (9, 64)),
  ((900, 2), (64, 9)),
]


def _image(size, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*size, channels)).astype(np.uint8)


def _tf(x, size, method, antialias):
  return tf.image.resize(x, size, method, antialias=antialias).numpy()


@pytest.mark.parametrize('antialias', [False, True])
@methods
def test_is_tensorflows_function(method, antialias):
  for (old, new), channels in zip(SIZES, [3, 1, 4, 3, 2, 3, 1, 5], strict=True):
    x = _image(old, channels)
    want = _tf(x.astype(np.float32), new, method, antialias)
    wide = np.asarray(Resized(x.astype(np.float32), new, method, antialias))
    assert wide.dtype == np.float32 and wide.shape == (*new, channels)
    # TensorFlow has a pixel's place in float32: off by 1e-4 of a pixel at 900.
    # At the gaussian's end, where it drops to 0, that takes a pixel in or out.
    atol = 2 if method == 'gaussian' and antialias else 0.03
    if method == 'bicubic' and not antialias:
      atol = 0.4  # Its weights are from a table of 1024 steps.
    np.testing.assert_allclose(wide, want, atol=atol)
    assert np.mean(np.abs(wide - want) > 2e-3) < 0.15
    got = np.asarray(Resized(x, new, method, antialias))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(
      got, np.floor(np.clip(wide * (1 + 2.0**-20), 0, 255))
    )


def test_area_is_the_mean_over_a_pixels_square():
  x = _image((5, 7)).astype(np.float64)
  # Repeated so often that the new pixels are of whole ones.
  fine = x.repeat(3, 0).repeat(4, 1)
  want = fine.reshape(3, 5, 4, 7, 3).mean((1, 3))
  got = np.asarray(Resized(x.astype(np.float32), (3, 4), 'area'))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@methods
@pytest.mark.parametrize('antialias', [False, True])
def test_a_constant_image_stays(method, antialias):
  for old, new in SIZES:
    for value in (255, 254, 77, 1):
      x = np.full((*old, 1), value, np.uint8)
      assert np.all(np.asarray(Resized(x, new, method, antialias)) == value)


@methods
@pytest.mark.parametrize('antialias', [False, True])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_a_window_is_that_of_the_whole(method, antialias, dtype):
  x = _image((37, 53)).astype(dtype)
  for size in ((20, 31), (70, 101)):
    image = Resized(x, size, method, antialias)
    whole = np.asarray(image)
    assert image.shape == whole.shape
    window = image.window(3, 5, 12, 20)
    assert window.shape == (12, 20, 3)
    np.testing.assert_array_equal(window, whole[3:15, 5:25])
    # And a window of a window.
    np.testing.assert_array_equal(window.window(2, 1, 10, 1), whole[5:15, 6:7])


@pytest.mark.parametrize('dtype', [np.int16, np.uint16, np.int32, np.float16])
@methods
def test_dtype_stays(method, dtype):
  x = (_image((9, 12)) * 100.0).astype(dtype)
  wide = np.asarray(Resized(x.astype(np.float32), (6, 17), method))
  got = np.asarray(Resized(x, (6, 17), method))
  assert got.dtype == dtype
  low = 0 if dtype == np.uint16 else -np.inf
  # The fraction, or what half a float32 has digits for.
  np.testing.assert_allclose(got, np.maximum(wide, low), atol=1, rtol=1e-3)


def test_out_of_the_range_is_clipped():
  x = np.zeros((8, 8, 1), np.int16)
  x[2:6, 2:6] = 32767
  wide = np.asarray(Resized(x.astype(np.float32), (21, 21), 'lanczos3'))
  got = np.asarray(Resized(x, (21, 21), 'lanczos3'))
  assert wide.max() > 32768 and got.max() == 32767 and got.min() < -100


def test_a_video():
  x = np.stack([_image((9, 12), seed=i) for i in range(3)])
  got = np.asarray(Resized(x, (6, 5), 'area'))
  assert got.shape == Resized(x, (6, 5)).shape == (3, 6, 5, 3)
  for frame, want in zip(got, x, strict=True):
    np.testing.assert_array_equal(frame, Resized(want, (6, 5), 'area'))
