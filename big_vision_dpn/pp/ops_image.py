"""Ops on one image: a tensor of shape [height, width, channels].

A uint8 image stays uint8 until `value_range`. Sizes are in pixels: one number
for a square, or (height, width). Shapes are static wherever they can be known
before any image is read.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from big_vision_dpn import config
from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.registry import register
from big_vision_dpn.pp.rng import Rng

Size = int | Sequence[int]
ImageFn = Callable[[tf.Tensor], tf.Tensor]
RandomImageFn = Callable[[tf.Tensor, Rng], tf.Tensor]

# Whether the method's results may lie outside of the range of its inputs.
_METHODS = {
  'area': False,
  'bicubic': True,
  'bilinear': False,
  'gaussian': False,
  'lanczos3': True,
  'lanczos5': True,
  'mitchellcubic': True,
  'nearest': False,
}


@register('decode', key='image')
def decode(channels: int = 3, precise: bool = False) -> ImageFn:
  """Decodes a JPEG, PNG, GIF or BMP file into a uint8 image.

  Of an animation it takes the first frame.

  Args:
    channels: 1 for gray, 3 for RGB, 4 for RGBA, 0 for what the file has.
    precise: decode JPEG by the accurate cosine transform, pixel for pixel as
      PIL, OpenCV and PyTorch do; otherwise by TensorFlow's fast one, with
      which big_vision trains. It then reads no BMP.
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


@register('resize', key='image')
def resize(
  size: Size, method: str = 'bilinear', antialias: bool = False
) -> ImageFn:
  """Resizes to `size`, whatever the aspect ratio was.

  The dtype stays; for integers the result is clipped to the dtype's range and
  its fraction cut off, as big_vision does.

  Args:
    size: the new size.
    method: see `tf.image.ResizeMethod`, e.g. bilinear, bicubic, area, nearest.
    antialias: when shrinking, let the method's kernel grow so that every pixel
      counts, as PIL does.
  """
  size = _pair(size)
  _check_method(method)
  return lambda image: _resize(image, size, method, antialias)


@register('resize_small', key='image')
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
  smaller_size, _ = _pair([smaller_size] * 2)
  _check_method(method)

  def fn(image: tf.Tensor) -> tf.Tensor:
    h, w = _size(image)
    # In float32 and to the nearest even, so that every image has the size that
    # it has in big_vision.
    if isinstance(h, int) and isinstance(w, int):
      factor = np.float32(smaller_size) / np.float32(min(h, w))
      size = [int(np.round(np.float32(n) * factor)) for n in (h, w)]
    else:
      sides = tf.cast(tf.stack([h, w]), tf.float32)
      size = tf.round(sides * (smaller_size / tf.reduce_min(sides)))
      size = tf.cast(size, tf.int32)
    return _resize(image, size, method, antialias)

  return fn


@register('inception_crop', random=True, key='image')
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
  finish = tf.identity if size is None else resize(size, method, antialias)

  def fn(image: tf.Tensor, rng: Rng) -> tf.Tensor:
    window = sample(tf.shape(image), rng.seed())
    return finish(_crop(image, *tf.unstack(window)))

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
  finish = tf.identity if size is None else resize(size, method, antialias)

  def fn(contents: tf.Tensor, rng: Rng) -> tf.Tensor:
    seed = rng.seed()

    def jpeg() -> tf.Tensor:
      window = sample(tf.image.extract_jpeg_shape(contents), seed)
      return tf.image.decode_and_crop_jpeg(contents, window, channels=3)

    def other() -> tf.Tensor:
      image = decode(channels=3)(contents)
      return _crop(image, *tf.unstack(sample(tf.shape(image), seed)))

    image = tf.cond(tf.io.is_jpeg(contents), jpeg, other)
    return finish(tf.ensure_shape(image, [None, None, 3]))

  return fn


@register('random_crop', random=True, key='image')
def random_crop(crop_size: Size) -> RandomImageFn:
  """Crops a rectangle of `crop_size` at a random place.

  An image smaller than that is an error: ConfigError where its shape is
  static, InvalidArgumentError at run time otherwise.
  """
  height, width = _pair(crop_size)

  def fn(image: tf.Tensor, rng: Rng) -> tf.Tensor:
    image = _check_fits(image, height, width)
    h, w = _size(image)
    y, x = rng.integer(h - height + 1), rng.integer(w - width + 1)
    return _crop(image, y, x, height, width)

  return fn


@register('central_crop', key='image')
def central_crop(crop_size: Size | None = None) -> ImageFn:
  """Crops a rectangle of `crop_size` from the middle.

  If what is cut off is odd, the larger part is below or on the right. An image
  smaller than the crop is an error, as with `random_crop`.

  Args:
    crop_size: None takes the largest square.
  """
  size = None if crop_size is None else _pair(crop_size)

  def fn(image: tf.Tensor) -> tf.Tensor:
    if size is not None:
      image = _check_fits(image, *size)
    h, w = _size(image)
    static = isinstance(h, int) and isinstance(w, int)
    side = min(h, w) if static else tf.minimum(h, w)
    height, width = size or (side, side)
    y, x = (h - height) // 2, (w - width) // 2
    return _crop(image, y, x, height, width)

  return fn


@register('flip_lr', random=True, key='image')
def flip_lr() -> RandomImageFn:
  """Mirrors the image, left to right, half of the time."""

  def fn(image: tf.Tensor, rng: Rng) -> tf.Tensor:
    # The second axis from the end, so that a video flips as a whole.
    return tf.cond(
      rng.coin(), lambda: tf.reverse(image, [-2]), lambda: tf.identity(image)
    )

  return fn


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
  config.choose('resize method', method, _METHODS)


def _size(image: tf.Tensor) -> list[int | tf.Tensor]:
  """Height and width: an int where static, an int32 scalar elsewhere."""
  dynamic = tf.shape(image)
  static = image.shape.with_rank(3)[:2]
  return [dynamic[i] if n is None else n for i, n in enumerate(static)]


def _resize(image, size, method: str, antialias: bool) -> tf.Tensor:
  out = tf.image.resize(image, size, method, antialias=antialias)
  if _METHODS[method]:
    return tf.saturate_cast(out, image.dtype)
  return tf.cast(out, image.dtype)


def _crop(image, y, x, height, width) -> tf.Tensor:
  crop = tf.slice(image, [y, x, 0], [height, width, -1])
  static = [n if isinstance(n, int) else None for n in (height, width)]
  return tf.ensure_shape(crop, [*static, image.shape[-1]])


def _check_fits(image: tf.Tensor, height: int, width: int) -> tf.Tensor:
  """`image`, which is checked to be no smaller than a crop."""
  problem = (
    f'a crop of {height} x {width} is larger than the image; put a resize '
    'before it, or make it smaller'
  )
  h, w = _size(image)
  dynamic = []
  for have, need in ((h, height), (w, width)):
    if not isinstance(have, int):
      dynamic.append(have >= need)
    elif have < need:
      raise ConfigError(f'{problem} (image: {image.shape})')
  checks = [
    tf.debugging.Assert(fits, [problem, tf.shape(image)]) for fits in dynamic
  ]
  with tf.control_dependencies(checks):
    return tf.identity(image)


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
