"""Ops on one image of shape [height, width, channels].

A uint8 image stays uint8 until `value_range`. Sizes are in pixels: one number
for a square, or (height, width). Shapes are static wherever they can be known
before any image is read. TensorFlow decodes, and NumPy does the rest: see
`pixels`.
"""

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import tensorflow as tf

from big_vision_dpn import config
from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.ops_general import linear_map
from big_vision_dpn.pp.pixels import Pixels
from big_vision_dpn.pp.registry import register
from big_vision_dpn.pp.resample import METHODS
from big_vision_dpn.pp.rng import Rng

Size = int | Sequence[int]
ImageFn = Callable[[Pixels], Pixels]
RandomImageFn = Callable[[Pixels, Rng], Pixels]


@register('decode', key='image')
def decode(
  channels: int = 3, precise: bool = False
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Decodes a JPEG, PNG, GIF or BMP file into a uint8 image.

  Of an animation it takes the first frame.

  Args:
    channels: 1 for gray (of JPEG and PNG), 3 for RGB, 4 for RGBA, 0 for what
      the file has.
    precise: decode JPEG by the accurate cosine transform, pixel for pixel as
      PIL, OpenCV and PyTorch do; otherwise by TensorFlow's fast one, with
      which big_vision trains. It then reads no BMP and no WebP.
  """
  if channels not in (0, 1, 3, 4):
    raise ConfigError(f'channels must be 0, 1, 3 or 4, not {channels!r}')

  def fn(contents: tf.Tensor) -> tf.Tensor:
    if precise:
      # The op's name is narrower than what it reads.
      image = tf.io.decode_jpeg(
        contents, channels, dct_method='INTEGER_ACCURATE'
      )
    else:
      image = tf.io.decode_image(contents, channels, expand_animations=False)
    return tf.ensure_shape(image, [None, None, channels or None])

  return fn


@register('resize', key='image', pixels=True)
def resize(
  size: Size, method: str = 'bilinear', antialias: bool = False
) -> ImageFn:
  """Resizes to `size`, whatever the aspect ratio was.

  The dtype stays; for integers the result is clipped to the dtype's range and
  its fraction cut off, as big_vision does. But a white area stays at 255, where
  TensorFlow's sums often end a hair below, and so at 254.

  Args:
    size: the new size.
    method: as of `tf.image.resize`: area, bicubic, bilinear, gaussian,
      lanczos3, lanczos5, mitchellcubic or nearest.
    antialias: when shrinking, let the method's kernel grow so that every pixel
      counts, as PIL does.
  """
  size = _pair(size)
  _check_method(method)
  return lambda image: _resize(image, size, method, antialias)


@register('resize_small', key='image', pixels=True)
def resize_small(
  smaller_size: int, method: str = 'area', antialias: bool = False
) -> ImageFn:
  """Resizes so that the smaller side is `smaller_size`; the aspect ratio stays.

  The dtype stays, as with `resize`.

  Args:
    smaller_size: the new length of the smaller side.
    method: see `resize`.
    antialias: see `resize`.
  """
  return _resize_side(min, smaller_size, method, antialias)


@register('resize_long', key='image', pixels=True)
def resize_long(
  longer_size: int, method: str = 'area', antialias: bool = True
) -> ImageFn:
  """Resizes so that the longer side is `longer_size`; the aspect ratio stays.

  The dtype stays, as with `resize`. The smaller side keeps a pixel at least.

  Args:
    longer_size: the new length of the longer side.
    method: see `resize`.
    antialias: see `resize`.
  """
  return _resize_side(max, longer_size, method, antialias)


@register('inception_crop', random=True, key='image', pixels=True)
def inception_crop(
  size: Size | None = None,
  area_min: float = 5,
  area_max: float = 100,
  method: str = 'bilinear',
  antialias: bool = False,
) -> RandomImageFn:
  """Crops a random rectangle, and resizes it to `size`.

  Its aspect ratio is between 3:4 and 4:3, and its area random too. Source:
  Szegedy et al. 2015, "Going Deeper with Convolutions", section 6.

  Args:
    size: the new size; None leaves the crop as it is.
    area_min: the smallest area, in percent of the image's.
    area_max: the largest area, likewise.
    method: see `resize`.
    antialias: see `resize`.
  """
  sample = _crop_sampler(area_min, area_max, 0.75, 1.33)
  finish = resize(size, method, antialias) if size is not None else None

  def fn(image: Pixels, rng: Rng) -> Pixels:
    shape = image.shape.with_rank(3)
    if not shape[:2].is_fully_defined():
      shape = tf.shape(image.tensor())
    box = sample(shape, rng.seed())
    unknown = (None, None, image.shape[-1])
    image = image.crop(lambda h, w, box: box, box, shape=unknown)
    return finish(image) if finish else image

  return fn


@register('decode_jpeg_and_inception_crop', random=True, key='image')
def decode_jpeg_and_inception_crop(
  size: Size | None = None,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 0.75,
  ratio_max: float = 1.33,
  method: str = 'bilinear',
  antialias: bool = False,
) -> RandomImageFn:
  """Decodes to RGB and crops as `inception_crop`, and resizes to `size`.

  Of a JPEG only the crop is decoded, which is faster than the two ops in turn.
  Any other format is decoded whole and then cropped.

  Args:
    size: the new size; None leaves the crop as it is.
    area_min: the smallest area, in percent of the image's.
    area_max: the largest area, likewise.
    ratio_min: the smallest aspect ratio, width over height.
    ratio_max: the largest aspect ratio.
    method: see `resize`.
    antialias: see `resize`.
  """
  sample = _crop_sampler(area_min, area_max, ratio_min, ratio_max)
  finish = resize(size, method, antialias) if size is not None else None

  def fn(contents: tf.Tensor, rng: Rng) -> Pixels:
    seed = rng.seed()

    def jpeg() -> tf.Tensor:
      box = sample(tf.image.extract_jpeg_shape(contents), seed)
      return tf.image.decode_and_crop_jpeg(contents, box, channels=3)

    def other() -> tf.Tensor:
      image = decode(channels=3)(contents)
      y, x, height, width = tf.unstack(sample(tf.shape(image), seed))
      return image[y : y + height, x : x + width]

    image = tf.cond(tf.io.is_jpeg(contents), jpeg, other)
    image = Pixels(tf.ensure_shape(image, [None, None, 3]))
    return finish(image) if finish else image

  return fn


@register('random_crop', random=True, key='image', pixels=True)
def random_crop(crop_size: Size) -> RandomImageFn:
  """Crops a rectangle of `crop_size` at a random place.

  An image smaller than that is an error: ConfigError where its shape is
  static, InvalidArgumentError at run time otherwise.
  """
  size = _pair(crop_size)

  def fn(image: Pixels, rng: Rng) -> Pixels:
    def window(h: int, w: int, draws: np.ndarray) -> tuple[int, ...]:
      y, x = _margins((h, w), size)
      return int(draws[0] * (y + 1)), int(draws[1] * (x + 1)), *size

    shape = _cropped_shape(image, size)
    return image.crop(window, rng.floats(2), shape=shape)

  return fn


@register('central_crop', key='image', pixels=True)
def central_crop(crop_size: Size | None = None) -> ImageFn:
  """Crops a rectangle of `crop_size` from the middle.

  If what is cut off is odd, the larger part is below or on the right. An image
  smaller than the crop is an error, as with `random_crop`.

  Args:
    crop_size: None takes the largest square.
  """
  size = None if crop_size is None else _pair(crop_size)

  def fn(image: Pixels) -> Pixels:
    def window(h: int, w: int) -> tuple[int, ...]:
      wanted = size or (min(h, w),) * 2
      y, x = _margins((h, w), wanted)
      return y // 2, x // 2, *wanted

    return image.crop(window, shape=_cropped_shape(image, size))

  return fn


@register('flip_lr', random=True, key='image', pixels=True)
def flip_lr() -> RandomImageFn:
  """Mirrors the image, left to right, half of the time."""

  def flip(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    if draws[0] >= 0.5:
      return image
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] <= 4:
      # Forty times faster than NumPy; it drops the axis of a single channel.
      return cv2.flip(image, 1).reshape(image.shape)
    # The second axis from the end, so that a video flips as a whole.
    return np.flip(image, -2)

  return lambda image, rng: image.map(flip, rng.floats(1))


@register('vgg_value_range', key='image')
def vgg_value_range(
  mean: Sequence[float] = (0.485 * 255, 0.456 * 255, 0.406 * 255),
  std: Sequence[float] = (0.229 * 255, 0.224 * 255, 0.225 * 255),
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Subtracts the mean and divides by the standard deviation, to float32.

  The values of most models that were trained with PyTorch.

  Args:
    mean: of each channel of ImageNet's images.
    std: likewise.
  """
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  if np.any(std == 0):
    raise ConfigError(f'std is {std.tolist()}; expected no 0')
  return linear_map(mean, std)


@register('clip_value_range', key='image')
def clip_value_range() -> Callable[[tf.Tensor], tf.Tensor]:
  """As `vgg_value_range`, with the values of CLIP.

  Source: Radford et al. 2021 (arXiv:2103.00020), its published code.
  """
  mean = np.float32([0.48145466, 0.4578275, 0.40821073]) * 255
  std = np.float32([0.26862954, 0.26130258, 0.27577711]) * 255
  return linear_map(mean, std)


def _pair(size: Size) -> tuple[int, int]:
  """(height, width) of a size argument."""
  pair = [size, size] if isinstance(size, int) else size
  if (
    not isinstance(pair, list | tuple)
    or len(pair) != 2
    or not all(type(n) is int and n > 0 for n in pair)
  ):
    raise ConfigError(
      'a size is a whole number of pixels or (height, width), such as 224 or '
      f'(224, 320), not {size!r}'
    )
  return tuple(pair)


def _check_method(method: str) -> None:
  config.choose('resize method', method, METHODS)


def _resize(
  image: Pixels,
  size: tuple[int, int] | Callable[[int, int], tuple[int, int]],
  method: str,
  antialias: bool,
) -> Pixels:
  """Resizes to a size, or to that which a function of the old one gives."""
  if image.shape.rank != 4:  # Not a video.
    image.shape.with_rank(3)
  shape = [None] * 3 if image.shape.rank is None else image.shape.as_list()
  old = tuple(shape[-3:-1])
  known = None not in old
  if callable(size):
    shape[-3:-1] = size(*old) if known else (None, None)
  else:
    shape[-3:-1] = size
  if known and tuple(shape[-3:-1]) == old:
    return image
  to = size if callable(size) else lambda h, w: size
  return image.resize(to, method, antialias, shape)


def _resize_side(
  pick: Callable[[int, int], int], side: int, method: str, antialias: bool
) -> ImageFn:
  """Resizes so that the side that `pick` picks gets the length `side`."""
  side, _ = _pair([side] * 2)
  _check_method(method)

  @functools.lru_cache(512)
  def size(h: int, w: int) -> tuple[int, int]:
    # In float32 and to the nearest even, so that every image has the size that
    # it has in big_vision.
    factor = np.float32(side) / np.float32(pick(h, w))
    height, width = (int(np.round(np.float32(n) * factor)) for n in (h, w))
    return max(height, 1), max(width, 1)

  return lambda image: _resize(image, size, method, antialias)


def _cropped_shape(
  image: Pixels, size: tuple[int, int] | None
) -> tuple[int | None, ...]:
  """The static shape of a crop; None is the largest square.

  Raises:
    ConfigError: it is known to be larger than the image.
  """
  h, w, channels = image.shape.with_rank(3).as_list()
  if size is None:
    side = None if None in (h, w) else min(h, w)
    return side, side, channels
  unknown = float('inf')
  try:
    _margins((h or unknown, w or unknown), size)
  except ValueError as e:
    raise ConfigError(str(e).replace('inf', '?')) from e
  return *size, channels


def _margins(have: tuple[int, int], want: tuple[int, int]) -> tuple[int, int]:
  """How many rows and columns there are more than a crop needs."""
  margins = have[0] - want[0], have[1] - want[1]
  if min(margins) < 0:
    raise ValueError(
      f'a crop of {want[0]} x {want[1]} is larger than the image, which is '
      f'{have[0]} x {have[1]}; put a resize before it, or make it smaller'
    )
  return margins


def _crop_sampler(
  area_min: float, area_max: float, ratio_min: float, ratio_max: float
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
  """A function of (shape [3], seed [2]) that draws [y, x, height, width]."""
  if not 0 < area_min <= area_max <= 100:
    raise ConfigError(
      'expected 0 < area_min <= area_max <= 100, in percent, got '
      f'{area_min} and {area_max}'
    )
  if not 0 < ratio_min <= ratio_max:
    raise ConfigError(
      f'expected 0 < ratio_min <= ratio_max, got {ratio_min} and {ratio_max}'
    )

  def sample(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      shape,
      tf.zeros([0, 0, 4]),
      seed,
      min_object_covered=0.0,
      aspect_ratio_range=(ratio_min, ratio_max),
      area_range=(area_min / 100, area_max / 100),
      use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], 0)

  return sample
