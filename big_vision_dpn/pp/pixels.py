"""Images on their way through the ops that are written in NumPy.

TensorFlow decodes, since it does so without Python and reads every format.
What follows is NumPy and OpenCV: several times faster for one image, and OpenCV
and SciPy compute without the lock of the Python interpreter. To enter Python
costs 0.05 ms, so consecutive ops are joined, and it is done once an image:
while the pipeline is traced such an op gets a `Pixels` in place of a tensor,
and adds a function to it. The function runs when an op needs the tensor.

    @register('flip_ud', key='image', pixels=True)
    def flip_ud():
      return lambda image: image.map(np.flipud)

    @register('brighten', random=True, key='image', pixels=True)
    def brighten():
      def fn(image, rng):
        return image.map(lambda x, draw: x + np.uint8(20 * draw[0]),
                         rng.floats(1))
      return fn
"""

import atexit
import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import cv2
import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.resample import Resized

# tf.data works on many examples at once; more threads would be in their way.
cv2.setNumThreads(0)


def _keep_freed_memory() -> None:
  """Tells glibc to hold on to what an op frees, for the next image.

  By its own rules, which depend on what was freed before, it may give back to
  the kernel every array of some 100 kB. Then each new one is of fresh pages,
  and to get them takes longer than to compute: a windowed resize was measured
  at 1.7 ms in place of 0.35. Other C libraries are left alone.
  """
  m_trim_threshold, m_mmap_threshold = -1, -3  # From malloc.h.
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(m_mmap_threshold, 8 << 20)
    libc.mallopt(m_trim_threshold, 32 << 20)


_keep_freed_memory()


class _Calls:
  """Lets the calls from tf.data's threads end before the interpreter does.

  An iterator that is alive then has threads at work until its buffers are full.
  One that waits for the interpreter's lock at that moment is killed, and the
  process with it: SIGABRT in place of its exit status.
  """

  def __init__(self):
    self._running: set[int] = set()
    self._last = 0.0
    atexit.register(self._wait)

  def __enter__(self):
    self._running.add(threading.get_ident())

  def __exit__(self, *exception):
    self._running.discard(threading.get_ident())
    self._last = time.monotonic()

  def _wait(self, silence: float = 0.1, limit: float = 20.0) -> None:
    end = time.monotonic() + limit
    while self._running or time.monotonic() < self._last + silence:
      if time.monotonic() > end:
        break
      time.sleep(silence / 10)


_calls = _Calls()
_Lazy = np.ndarray | Resized
_Step = tuple[Callable[..., _Lazy], tuple[tf.Tensor, ...]]


class Pixels:
  """An image, and functions in NumPy that are yet to be applied to it.

  Immutable: every method returns another one.

  Attributes:
    shape: a tf.TensorShape, as far as it is known before there is an image.
    dtype: a tf.DType.
  """

  def __init__(self, image: tf.Tensor):
    self.shape, self.dtype = image.shape, image.dtype
    self._source: tf.Tensor = image
    self._steps: tuple[_Step, ...] = ()

  @classmethod
  def of(cls, value: Any) -> 'Pixels':
    """A tensor, or anything like it, as Pixels; Pixels as they are.

    Raises:
      ConfigError: it is a string, so an image that is not yet decoded.
    """
    if isinstance(value, Pixels):
      return value
    image = tf.convert_to_tensor(value)
    if image.dtype == tf.string:
      raise ConfigError(
        'expected an image, but found the contents of a file; put decode before'
      )
    return cls(image)

  def map(
    self,
    fn: Callable[..., np.ndarray],
    *inputs: tf.Tensor,
    shape: Iterable[int | None] | None = None,
    dtype: tf.DType | None = None,
  ) -> 'Pixels':
    """Applies a function to the image.

    Args:
      fn: from an array, which it must not change, and the arrays of `inputs`,
        to an array. It is called from several threads at once. A ValueError of
        it becomes an InvalidArgumentError with its message.
      *inputs: tensors that the function needs, such as `rng.floats(2)`.
      shape: of the result, None where unknown; by default the image's.
      dtype: of the result; by default the image's.
    """

    def step(x: _Lazy, *values: np.ndarray) -> np.ndarray:
      return fn(np.asarray(x), *values)

    return self._then(step, inputs, shape, dtype)

  def resize(
    self,
    size: Callable[[int, int], tuple[int, int]],
    method: str,
    antialias: bool,
    shape: Iterable[int | None],
  ) -> 'Pixels':
    """Resizes, as far as a crop that follows needs it.

    Args:
      size: from height and width to the new ones.
      method: see `resample.Resized`.
      antialias: likewise.
      shape: of the result, None where unknown.
    """

    def step(x: _Lazy) -> Resized:
      x = np.asarray(x)
      return Resized(x, size(*x.shape[-3:-1]), method, antialias)

    return self._then(step, (), shape, None)

  def crop(
    self,
    window: Callable[..., Iterable[int]],
    *inputs: tf.Tensor,
    shape: Iterable[int | None],
  ) -> 'Pixels':
    """Takes a rectangle of a [height, width, channels] image.

    Args:
      window: from height, width and the arrays of `inputs` to y, x, height and
        width of the rectangle.
      *inputs: as for `map`.
      shape: of the result, None where unknown.
    """

    def step(x: _Lazy, *values: np.ndarray) -> _Lazy:
      box = window(*x.shape[:2], *values)
      y, x0, height, width = (int(n) for n in box)
      if isinstance(x, Resized):
        return x.window(y, x0, height, width)
      return x[y : y + height, x0 : x0 + width]

    return self._then(step, inputs, shape, None)

  def tensor(self) -> tf.Tensor:
    """The image as a tensor; all functions run in one call of Python."""
    if self._steps:
      self._source, self._steps = self._run(), ()
    return self._source

  def _run(self) -> tf.Tensor:
    steps = self._steps

    def run(x: np.ndarray, *values: np.ndarray) -> np.ndarray:
      with _calls:
        remaining = iter(values)
        for fn, inputs in steps:
          x = fn(x, *(next(remaining) for _ in inputs))
        return np.ascontiguousarray(x)

    inputs = [self._source, *(t for _, inputs in steps for t in inputs)]
    # Without a state: the same inputs always give the same image.
    image = tf.numpy_function(run, inputs, self.dtype, stateful=False)
    return tf.ensure_shape(image, self.shape)

  def _then(
    self,
    step: Callable[..., _Lazy],
    inputs: tuple[tf.Tensor, ...],
    shape: Iterable[int | None] | None,
    dtype: tf.DType | None,
  ) -> 'Pixels':
    after = Pixels(self._source)
    after._steps = (*self._steps, (step, inputs))
    after.shape = self.shape if shape is None else tf.TensorShape(shape)
    after.dtype = dtype or self.dtype
    return after


def to_tensor(value: Any) -> Any:
  """Pixels as a tensor, anything else as it is."""
  return value.tensor() if isinstance(value, Pixels) else value
