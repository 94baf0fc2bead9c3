"""Resizing in NumPy: the functions of `tf.image.resize`, several times faster.

A resize is a weighted mean along the columns and one along the rows. Both are
products with sparse matrices, whose rows hold the weights of one pixel of the
result, so that a crop of the result costs as much as the crop is large. Pixels
are squares: the middle of pixel i is at i + 0.5, in both images.
"""

import functools
from collections.abc import Callable

import cv2
import numpy as np
import scipy.sparse

# Whether the method's results may lie outside of the range of its inputs.
METHODS = {
  'area': False,
  'bicubic': True,
  'bilinear': False,
  'gaussian': False,
  'lanczos3': True,
  'lanczos5': True,
  'mitchellcubic': True,
  'nearest': False,
}
Box = tuple[int, int, int, int]


class Resized:
  """A resized image, not yet computed; `np.asarray` computes it.

  `window` makes a part of it, equal to the same part of the whole.
  """

  def __init__(
    self,
    image: np.ndarray,
    size: tuple[int, int],
    method: str = 'bilinear',
    antialias: bool = False,
    box: Box | None = None,
  ):
    """Resizes as `tf.image.resize` does.

    The dtype stays. For integers the result is clipped to the dtype's range if
    the method may leave it, and its fraction is cut off. TensorFlow's sums end
    a hair below a whole number as often as not, so that big_vision's white
    areas get spots of 254; here they stay at 255.

    Args:
      image: [height, width, channels], or [frames, height, width, channels].
      size: the new height and width.
      method: a key of METHODS.
      antialias: when shrinking, stretch the method's kernel. It changes nothing
        for area and nearest.
      box: y, x, height and width of the part of the result that is wanted.
    """
    self._image, self._size = image, size
    self._method, self._antialias = method, antialias
    self._box = box or (0, 0, *size)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self._image.shape[:-3], *self._box[2:], self._image.shape[-1])

  def window(self, y: int, x: int, height: int, width: int) -> 'Resized':
    """The part of that size whose first pixel is (y, x)."""
    box = (self._box[0] + y, self._box[1] + x, height, width)
    return Resized(self._image, self._size, self._method, self._antialias, box)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    if self._image.ndim == 4:
      out = np.stack([self._resize(frame) for frame in self._image])
    else:
      out = self._resize(self._image)
    return out if dtype is None else out.astype(dtype)

  def _resize(self, image: np.ndarray) -> np.ndarray:
    if self._method == 'nearest':
      return _nearest(image, self._size, self._box)
    if self._method == 'bilinear' and not self._antialias:
      out = _bilinear(image, self._size, self._box)
    else:
      kernel = (self._method, self._antialias)
      out = _separable(image, self._size, self._box, kernel)
    if np.issubdtype(image.dtype, np.integer):
      # More than the error of float32, so that a white area stays at 255.
      out *= 1 + 2.0**-20
      if METHODS[self._method]:
        limits = np.iinfo(image.dtype)
        np.clip(out, limits.min, limits.max, out=out)
    return out.astype(image.dtype)


def _nearest(image: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
  for axis in (0, 1):
    # In float32, to take the same one of two pixels as TensorFlow.
    scale = np.float32(image.shape[axis]) / np.float32(size[axis])
    middles = np.arange(box[axis], box[axis] + box[axis + 2]) + np.float32(0.5)
    places = (middles.astype(np.float32) * scale).astype(int)
    image = image.take(np.minimum(places, image.shape[axis] - 1), axis)
  return image


def _bilinear(image: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
  # In float32 it is the same function, and twice as fast as by matrices. For
  # uint8 it is not: OpenCV then has weights of 11 bits, and rounds.
  out = cv2.resize(image.astype(np.float32), size[::-1])
  y, x, height, width = box
  out = out.reshape(*size, image.shape[-1])
  return out[y : y + height, x : x + width]


def _separable(
  image: np.ndarray, size: tuple[int, int], box: Box, kernel: tuple[str, bool]
) -> np.ndarray:
  """float32 of the box's size, by two matrix products."""
  y, x, height, width = box
  rows, down = _weights(image.shape[0], size[0], y, height, *kernel)
  columns, across = _weights(image.shape[1], size[1], x, width, *kernel)
  # The columns first, so that what is transposed is a quarter of the bytes.
  part = _transpose(image[rows, columns]).astype(np.float32)
  _, between, channels = part.shape
  out = across @ part.reshape(-1, between * channels)
  out = _transpose(out.reshape(width, between, channels))
  out = down @ out.reshape(between, width * channels)
  return out.reshape(height, width, channels)


def _transpose(x: np.ndarray) -> np.ndarray:
  height, width, channels = x.shape
  if channels > 4 or x.dtype not in (np.uint8, np.float32):
    return np.ascontiguousarray(x.transpose(1, 0, 2))
  # Several times faster than NumPy; it drops the axis of a single channel.
  return cv2.transpose(x).reshape(width, height, channels)


@functools.lru_cache(512)
def _weights(
  size: int,
  new_size: int,
  start: int,
  count: int,
  method: str,
  antialias: bool,
) -> tuple[slice, scipy.sparse.csr_array]:
  """The weights of `count` pixels of the result, along one axis.

  Args:
    size: pixels along the axis.
    new_size: pixels of the whole result.
    start: the first pixel of the result that is wanted.
    count: how many of them.
    method: a key of METHODS, but nearest.
    antialias: see `Resized`.

  Returns:
    The pixels that have a weight, and float32 [count, their number].
  """
  scale = size / new_size
  index = np.arange(start, start + count)[:, None]
  if method == 'area':
    low, high = index * scale, (index + 1) * scale
    places = np.floor(low) + np.arange(int(np.ceil(scale)) + 1)
    weights = np.minimum(places + 1, high) - np.maximum(places, low)
    weights = np.maximum(weights, 0)
  else:
    kernel, radius = _KERNELS[method]
    stretch = max(scale, 1.0) if antialias else 1.0
    middle = (index + 0.5) * scale
    if method == 'bicubic' and not antialias:
      # TensorFlow has a table of this kernel, with 1024 steps a pixel.
      middle = np.rint((middle - 0.5) * 1024) / 1024 + 0.5
    first = np.ceil(middle - radius * stretch - 0.5)
    places = first + np.arange(int(2 * radius * stretch) + 1)
    weights = kernel(np.abs(places + 0.5 - middle) / stretch)
  weights = np.where((places >= 0) & (places < size), weights, 0)
  weights /= weights.sum(1, keepdims=True)
  return _sparse(weights, places.astype(np.int32))


def _sparse(
  weights: np.ndarray, places: np.ndarray
) -> tuple[slice, scipy.sparse.csr_array]:
  used = np.abs(weights) > 1e-8
  begins = np.concatenate([[0], np.cumsum(used.sum(1))]).astype(np.int32)
  places = places[used]
  first, end = int(places.min()), int(places.max()) + 1
  matrix = scipy.sparse.csr_array(
    (weights[used].astype(np.float32), places - first, begins),
    shape=(len(weights), end - first),
  )
  return slice(first, end), matrix


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - x, 0)


def _keys(x: np.ndarray) -> np.ndarray:
  """Keys 1981, "Cubic convolution interpolation", with a = −0.5."""
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0))


def _mitchell(x: np.ndarray) -> np.ndarray:
  """Mitchell and Netravali 1988, with B = C = 1/3."""
  near = (7 / 6 * x - 2) * x * x + 8 / 9
  far = ((-7 / 18 * x + 2) * x - 10 / 3) * x + 16 / 9
  return np.where(x < 1, near, np.where(x < 2, far, 0))


def _gaussian(x: np.ndarray) -> np.ndarray:
  return np.where(x < 1.5, np.exp(-2 * x * x), 0)


def _lanczos(radius: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: np.where(x < radius, np.sinc(x) * np.sinc(x / radius), 0)


# The weight at a distance in pixels, and the distance where it becomes 0.
_KERNELS = {
  'bicubic': (_keys, 2),
  'bilinear': (_triangle, 1),
  'gaussian': (_gaussian, 1.5),
  'lanczos3': (_lanczos(3), 3),
  'lanczos5': (_lanczos(5), 5),
  'mitchellcubic': (_mitchell, 2),
}
