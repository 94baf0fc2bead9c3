"""RandAugment, on one uint8 RGB image.

Source: Cubuk et al. 2019, "RandAugment: Practical automated data augmentation
with a reduced search space" (arXiv:1909.13719), whose transforms are those of
Cubuk et al. 2018, "AutoAugment" (arXiv:1805.09501). They are described there in
terms of PIL, and here they give what PIL gives, up to rounding. The ranges of
the magnitudes are big_vision's, but two of its transforms no longer do what
they are named after, and here they do:

* Solarize at magnitude 10 has the threshold 256, which no pixel reaches, so
  that the image stays. There, on today's TensorFlow, 256 wraps to 0 in uint8
  and every image is inverted.
* Contrast blends with the image's mean gray. There, with a constant.

Speed decides how a transform is written: TensorFlow does arithmetic on whole
planes of pixels several times faster than it looks values up (`tf.gather`),
selects them (`tf.where`), or broadcasts along the three channels.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.registry import register
from big_vision_dpn.pp.rng import Rng

# What fills the places that a transform leaves empty.
_FILL = 128
# PIL's weights of red, green and blue in gray, in units of 2^-16.
_GRAY = (19595, 38470, 7471)


@register('randaug', random=True, key='image')
def randaug(
  num_layers: int = 2, magnitude: float = 10
) -> Callable[[tf.Tensor, Rng], tf.Tensor]:
  """Applies `num_layers` random transforms, one after another.

  Each is drawn evenly out of sixteen: AutoContrast, Equalize, Invert, Rotate,
  Posterize, Solarize, Color, Contrast, Brightness, Sharpness, ShearX, ShearY,
  TranslateX, TranslateY, Cutout, SolarizeAdd. For uint8 images of shape
  [height, width, 3]; the shape stays. Lengths are in pixels whatever the
  image's size: at magnitude 10 a translation of 100 blanks a 32-pixel image.

  Args:
    num_layers: how many transforms; N in the paper.
    magnitude: how strong they are, 10 being the usual full scale; M in the
      paper. Not random.
  """
  if type(num_layers) is not int or num_layers < 0:
    raise ConfigError(f'num_layers must be 0, 1, 2, ..., not {num_layers!r}')
  if not magnitude >= 0:
    raise ConfigError(f'magnitude must not be negative, got {magnitude!r}')

  def fn(image: tf.Tensor, rng: Rng) -> tf.Tensor:
    if image.dtype != tf.uint8 or not image.shape.is_compatible_with(
      [None, None, 3]
    ):
      raise ConfigError(
        'works on uint8 images of shape [height, width, 3], so before '
        f'value_range; got {image.dtype.name}, {image.shape}'
      )
    shape = image.shape
    for _ in range(num_layers):
      sign = tf.where(rng.coin(), 1.0, -1.0)
      center = [rng.integer(n) for n in tf.unstack(tf.shape(image)[:2])]
      branches = list(transforms(image, magnitude, sign, center).values())
      image = tf.switch_case(rng.integer(len(branches)), branches)
      image = tf.ensure_shape(image, shape)
    return image

  return fn


def transforms(
  image: tf.Tensor, level: float, sign: tf.Tensor, center: list[tf.Tensor]
) -> dict[str, Callable[[], tf.Tensor]]:
  """The sixteen transforms of an image at a level, by name, not yet applied.

  Args:
    image: uint8 of shape [height, width, 3].
    level: the magnitude.
    sign: float32 scalar, 1 or -1: which way the geometric transforms go.
    center: int32 scalars (y, x): the middle of Cutout.
  """
  factor = 1.8 * level / 10 + 0.1
  shear = sign * (0.3 * level / 10)
  pixels = sign * (100 * level / 10)
  degrees = sign * (30 * level / 10)
  return {
    'AutoContrast': lambda: autocontrast(image),
    'Equalize': lambda: equalize(image),
    'Invert': lambda: invert(image),
    'Rotate': lambda: rotate(image, degrees),
    'Posterize': lambda: posterize(image, int(4 * level / 10)),
    'Solarize': lambda: solarize(image, int(256 * level / 10)),
    'Color': lambda: color(image, factor),
    'Contrast': lambda: contrast(image, factor),
    'Brightness': lambda: brightness(image, factor),
    'Sharpness': lambda: sharpness(image, factor),
    'ShearX': lambda: _warp(image, [1, shear, 0, 0, 1, 0]),
    'ShearY': lambda: _warp(image, [1, 0, 0, shear, 1, 0]),
    'TranslateX': lambda: _warp(image, [1, 0, pixels, 0, 1, 0]),
    'TranslateY': lambda: _warp(image, [1, 0, 0, 0, 1, pixels]),
    'Cutout': lambda: cutout(image, int(40 * level / 10), center),
    'SolarizeAdd': lambda: solarize_add(image, int(110 * level / 10)),
  }


def autocontrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches each channel linearly to 0 to 255; a constant one stays."""

  def stretch(plane: tf.Tensor) -> tf.Tensor:
    low = tf.cast(tf.reduce_min(plane), tf.float32)
    high = tf.cast(tf.reduce_max(plane), tf.float32)
    flat = low == high
    low, span = tf.where(flat, 0.0, low), tf.where(flat, 255.0, high - low)
    # A quotient of whole numbers this small is exact if it is whole, and else
    # farther from a whole number than float32 rounds: the cast is a floor.
    return tf.cast((tf.cast(plane, tf.float32) - low) * 255 / span, tf.uint8)

  return _by_channel(stretch, image)


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Spreads each channel's values until their histogram is about even.

  A channel with too few pixels for that stays, as in PIL.
  """

  def spread(plane: tf.Tensor) -> tf.Tensor:
    plane = tf.cast(plane, tf.int32)
    histogram = tf.histogram_fixed_width(plane, [0, 256], 256)
    below = tf.cumsum(histogram, exclusive=True)
    # The pixels below the brightest value share the other 255 levels.
    step = tf.reduce_max(below * tf.cast(histogram > 0, tf.int32)) // 255
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.where(step == 0, tf.range(256), table)
    return tf.gather(tf.cast(table, tf.uint8), plane)

  return _by_channel(spread, image)


def invert(image: tf.Tensor) -> tf.Tensor:
  """255 minus every value."""
  return 255 - image


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
  """Keeps the highest `bits` bits of every value, at least 1 and at most 8.

  So at a magnitude below 2.5, where no bit would remain, the image turns into
  eight colors and not black. It does so in big_vision too, since TensorFlow
  shifts a uint8 by 7 at most.
  """
  dropped = 8 - min(max(bits, 1), 8)
  mask = tf.constant(256 - (1 << dropped), tf.uint8)
  return tf.bitwise.bitwise_and(image, mask)


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
  """Inverts the values of `threshold` or more; above 255 the image stays."""
  if threshold > 255:
    return tf.identity(image)
  inverted = tf.cast(image >= tf.constant(threshold, tf.uint8), tf.uint8) * 255
  return tf.bitwise.bitwise_xor(image, inverted)


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
  """Adds `addition` to the values below 128, up to 255."""
  dark = tf.cast(image < tf.constant(128, tf.uint8), tf.uint8)
  room = 255 - image
  return image + dark * tf.minimum(
    room, tf.constant(min(addition, 255), tf.uint8)
  )


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Changes the saturation: 0 is gray, 1 the image, more is more."""
  gray = tf.cast(_gray(image), tf.float32)
  return _by_channel(lambda plane: _blend(gray, plane, factor), image)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Changes the contrast: 0 is the mean gray, 1 the image, more is more.

  The mean of the gray image, rounded to the nearest whole number.
  """
  # Row by row, since the sum of a large image exceeds an int32.
  total = tf.reduce_sum(tf.cast(tf.reduce_sum(_gray(image), 1), tf.int64))
  count = tf.cast(tf.size(image) // 3, tf.int64)
  mean = (total + count // 2) // count
  return _blend(tf.cast(mean, tf.float32), image, factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Multiplies by `factor`: 0 is black, 1 the image, more is more."""
  return _blend(0.0, image, factor)


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Changes the sharpness: 0 is smoothed, 1 the image, more is sharpened.

  Smoothed is each pixel's mean with its eight neighbors, itself five times,
  rounded to the nearest whole number. The outermost pixels stay.
  """
  x = tf.cast(image, tf.float32)
  rows = x[:-2] + x[1:-1] + x[2:]
  total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
  smooth = tf.floor((total + 6) / 13)
  inside = _blend(smooth, image[1:-1, 1:-1], factor)
  # Cut so that an image of one or two rows or columns comes out whole.
  below, right = image[1:], image[1:-1, 1:]
  middle = tf.concat([image[1:-1, :1], inside, right[:, -1:]], 1)
  return tf.concat([image[:1], middle, below[-1:]], 0)


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
  """Rotates counterclockwise around the middle; empty places become gray.

  Args:
    image: uint8 of shape [height, width, 3].
    degrees: float32 scalar.
  """
  radians = degrees * (math.pi / 180)
  cos, sin = tf.cos(radians), tf.sin(radians)
  size = tf.cast(tf.shape(image), tf.float32)
  y, x = (size[0] - 1) / 2, (size[1] - 1) / 2
  return _warp(
    image,
    [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y],
  )


def cutout(image: tf.Tensor, half: int, center: list[tf.Tensor]) -> tf.Tensor:
  """Makes a square gray, as far as it lies in the image.

  Source: DeVries and Taylor 2017 (arXiv:1708.04552).

  Args:
    image: uint8 of shape [height, width, 3].
    half: half of the square's side.
    center: int32 scalars (y, x); the square goes from y - half to y + half,
      that row not included.
  """
  y, x = center
  height, width = tf.unstack(tf.shape(image)[:2])
  top, bottom = tf.maximum(y - half, 0), tf.minimum(y + half, height)
  left, right = tf.maximum(x - half, 0), tf.minimum(x + half, width)
  gray = tf.fill([bottom - top, right - left, 3], tf.constant(_FILL, tf.uint8))
  rows = image[top:bottom]
  rows = tf.concat([rows[:, :left], gray, rows[:, right:]], 1)
  return tf.concat([image[:top], rows, image[bottom:]], 0)


def _by_channel(fn: Callable[[tf.Tensor], tf.Tensor], image) -> tf.Tensor:
  return tf.stack([fn(plane) for plane in tf.unstack(image, 3, -1)], -1)


def _gray(image: tf.Tensor) -> tf.Tensor:
  """PIL's gray, int32 of shape [height, width]."""
  planes = tf.unstack(tf.cast(image, tf.int32), 3, -1)
  total = sum(weight * p for weight, p in zip(_GRAY, planes, strict=True))
  return tf.bitwise.right_shift(total + (1 << 15), 16)


def _blend(base: float | tf.Tensor, image, factor: float) -> tf.Tensor:
  """base + factor · (image − base), clipped, its fraction cut off."""
  value = base + factor * (tf.cast(image, tf.float32) - base)
  return tf.cast(tf.clip_by_value(value, 0.0, 255.0), tf.uint8)


def _warp(image: tf.Tensor, affine: list) -> tf.Tensor:
  """Moves pixels; an empty place becomes gray.

  Args:
    image: uint8 of shape [height, width, 3].
    affine: six numbers; the pixel (x, y) of the result is the one nearest to
      (a·x + b·y + c, d·x + e·y + f) of the image.
  """
  transform = tf.stack([tf.cast(n, tf.float32) for n in [*affine, 0, 0]])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=transform[None],
    output_shape=tf.shape(image)[:2],
    fill_value=float(_FILL),
    interpolation='NEAREST',
    fill_mode='CONSTANT',
  )[0]
