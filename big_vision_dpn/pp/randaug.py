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

A transform of an image takes and returns uint8 of shape [height, width, 3], and
does not change the array that it is given.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.pixels import Pixels
from big_vision_dpn.pp.registry import register
from big_vision_dpn.pp.rng import Rng

# From the image, 1 or -1 for the way that a geometric transform goes, and two
# numbers in [0, 1) for the middle of Cutout.
Transform = Callable[[np.ndarray, int, tuple[float, float]], np.ndarray]

# What fills the places that a transform leaves empty.
_FILL = 128
# PIL's weights of red, green and blue in gray, and a half to round, in units of
# 2^-16. Float32 adds them without an error.
_GRAY = np.array([[19595, 38470, 7471, 1 << 15]], np.float32)
# PIL's mean of a pixel, five times, and its eight neighbors.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_LEVELS = np.arange(256)
_COLUMN = _LEVELS[:, None]


@register('randaug', random=True, key='image', pixels=True)
def randaug(
  num_layers: int = 2, magnitude: float = 10
) -> Callable[[Pixels, Rng], Pixels]:
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
  choices = list(transforms(magnitude).values())

  def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    for which, way, y, x in draws.reshape(-1, 4).tolist():
      transform = choices[int(which * len(choices))]
      image = transform(image, 1 if way < 0.5 else -1, (y, x))
    return image

  def fn(image: Pixels, rng: Rng) -> Pixels:
    if image.dtype != tf.uint8 or not image.shape.is_compatible_with(
      [None, None, 3]
    ):
      raise ConfigError(
        'works on uint8 images of shape [height, width, 3], so before '
        f'value_range; got {image.dtype.name}, {image.shape}'
      )
    return image.map(augment, rng.floats(4 * num_layers))

  return fn


def transforms(level: float) -> dict[str, Transform]:
  """The sixteen transforms at a magnitude, by name."""
  factor = 1.8 * level / 10 + 0.1
  shear, pixels, degrees = 0.3 * level / 10, 100 * level / 10, 30 * level / 10
  half = int(40 * level / 10)
  add, threshold = int(110 * level / 10), int(256 * level / 10)
  return {
    'AutoContrast': lambda image, sign, at: autocontrast(image),
    'Equalize': lambda image, sign, at: equalize(image),
    'Invert': lambda image, sign, at: invert(image),
    'Rotate': lambda image, sign, at: rotate(image, sign * degrees),
    'Posterize': lambda image, sign, at: posterize(image, int(4 * level / 10)),
    'Solarize': lambda image, sign, at: solarize(image, threshold),
    'Color': lambda image, sign, at: color(image, factor),
    'Contrast': lambda image, sign, at: contrast(image, factor),
    'Brightness': lambda image, sign, at: brightness(image, factor),
    'Sharpness': lambda image, sign, at: sharpness(image, factor),
    'ShearX': lambda image, sign, at: _warp(
      image, (1, sign * shear, 0, 0, 1, 0)
    ),
    'ShearY': lambda image, sign, at: _warp(
      image, (1, 0, 0, sign * shear, 1, 0)
    ),
    'TranslateX': lambda image, sign, at: _warp(
      image, (1, 0, sign * pixels, 0, 1, 0)
    ),
    'TranslateY': lambda image, sign, at: _warp(
      image, (1, 0, 0, 0, 1, sign * pixels)
    ),
    'Cutout': lambda image, sign, at: cutout(image, half, at),
    'SolarizeAdd': lambda image, sign, at: solarize_add(image, add),
  }


def autocontrast(image: np.ndarray) -> np.ndarray:
  """Stretches each channel linearly to 0 to 255; a constant one stays."""
  ends = [cv2.minMaxLoc(plane)[:2] for plane in cv2.split(image)]
  low, high = np.array(ends, np.int64).T
  span = high - low
  tables = (_COLUMN - low) * 255 // np.maximum(span, 1)
  tables = np.where(span > 0, np.clip(tables, 0, 255), _COLUMN)
  return _look_up(image, tables[None])


def equalize(image: np.ndarray) -> np.ndarray:
  """Spreads each channel's values until their histogram is about even.

  A channel with too few pixels for that stays, as in PIL.
  """
  histograms = [
    cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel()
    for channel in range(3)
  ]
  histograms = np.stack(histograms, 1).astype(np.int64)
  total = np.cumsum(histograms, 0)
  # The pixels below the brightest value share the other 255 levels.
  below = total - histograms
  step = np.where(histograms > 0, below, 0).max(0) // 255
  tables = (below + step // 2) // np.maximum(step, 1)
  tables = np.where(step > 0, np.minimum(tables, 255), _COLUMN)
  return _look_up(image, tables[None])


def invert(image: np.ndarray) -> np.ndarray:
  """255 minus every value."""
  return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the highest `bits` bits of every value, at least 1 and at most 8.

  So at a magnitude below 2.5, where no bit would remain, the image turns into
  eight colors and not black. It does so in big_vision too, since TensorFlow
  shifts a uint8 by 7 at most.
  """
  dropped = 8 - min(max(bits, 1), 8)
  return image & np.uint8(256 - (1 << dropped))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values of `threshold` or more; above 255 the image stays."""
  bright = threshold <= _LEVELS
  return _look_up(image, np.where(bright, 255 - _LEVELS, _LEVELS))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
  """Adds `addition` to the values below 128, up to 255."""
  more = np.minimum(_LEVELS + addition, 255)
  return _look_up(image, np.where(_LEVELS < 128, more, _LEVELS))


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """Changes the saturation: 0 is gray, 1 the image, more is more."""
  return _blend(cv2.merge([_gray(image)] * 3), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Changes the contrast: 0 is the mean gray, 1 the image, more is more.

  The mean of the gray image, rounded to the nearest whole number.
  """
  mean = int(cv2.mean(_gray(image))[0] + 0.5)
  return _look_up(image, _blend(np.float32(mean), _LEVELS, factor))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Multiplies by `factor`: 0 is black, 1 the image, more is more."""
  return _look_up(image, _blend(np.float32(0), _LEVELS, factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Changes the sharpness: 0 is smoothed, 1 the image, more is sharpened.

  Smoothed is each pixel's mean with its eight neighbors, itself five times,
  rounded to the nearest whole number. The outermost pixels stay.
  """
  smooth = cv2.filter2D(image, -1, _SMOOTH)
  out = _blend(smooth.astype(np.float32), image, factor)
  for edge in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):
    out[edge] = image[edge]
  return out


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Rotates counterclockwise around the middle; empty places become gray."""
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  y, x = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
  right, down = x - cos * x + sin * y, y - sin * x - cos * y
  return _warp(image, (cos, -sin, right, sin, cos, down))


def cutout(image: np.ndarray, half: int, at: tuple[float, float]) -> np.ndarray:
  """Makes a square gray, as far as it lies in the image.

  Source: DeVries and Taylor 2017 (arXiv:1708.04552).

  Args:
    image: uint8 of shape [height, width, 3].
    half: half of the square's side.
    at: the middle (y, x), each in [0, 1) of the image's size. The square goes
      from row y - half to y + half, that row not included.
  """
  y, x = (int(part * n) for part, n in zip(at, image.shape, strict=False))
  image = image.copy()
  image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = _FILL
  return image


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  """`table`: of all channels, (256,), or of each, (1, 256, 3)."""
  return cv2.LUT(image, table.astype(np.uint8))


def _gray(image: np.ndarray) -> np.ndarray:
  """PIL's gray: whole numbers in float32, of shape [height, width]."""
  gray = cv2.transform(image.astype(np.float32), _GRAY)
  gray *= 2.0**-16
  return np.floor(gray, out=gray)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
  """base + factor · (image − base), clipped, its fraction cut off.

  In float32, as PIL does, so that the same fractions are cut off.
  """
  value = image.astype(np.float32)
  value -= base
  value *= np.float32(factor)
  value += base
  return np.clip(value, 0, 255, out=value).astype(np.uint8)


def _warp(image: np.ndarray, affine: tuple[float, ...]) -> np.ndarray:
  """Moves pixels; an empty place becomes gray.

  Args:
    image: uint8 of shape [height, width, 3].
    affine: six numbers; the pixel (x, y) of the result is the one nearest to
      (a·x + b·y + c, d·x + e·y + f) of the image.
  """
  h, w, _ = image.shape
  a, b, c, d, e, f = (np.float32(n) for n in affine)
  x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
  columns = _nearest(a * x + (b * y + c), w)
  rows = _nearest(d * x + (e * y + f), h)
  if max(h, w) >= 1 << 15:  # More than OpenCV's maps can hold.
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=_FILL)
    return padded[rows + 1, columns + 1]
  # Not cv2.warpAffine, which rounds places so coarsely that some pixels come
  # from a neighbor of the nearest one.
  return cv2.remap(
    image,
    np.stack([columns, rows], -1, dtype=np.int16, casting='unsafe'),
    None,
    cv2.INTER_NEAREST,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=(_FILL,) * 3,
  )


def _nearest(places: np.ndarray, size: int) -> np.ndarray:
  """The nearest whole numbers, but -1 and `size` for all outside."""
  # To cut off the fraction rounds to the nearest here, where all is positive.
  places += 1.5
  return np.clip(places, 0, size + 1, out=places).astype(np.int32) - 1
