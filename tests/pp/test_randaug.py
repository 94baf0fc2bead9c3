"""RandAugment's sixteen transforms against PIL, and how they are drawn."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp import randaug
from big_vision_dpn.pp.builder import get_preprocess_fn

GRAY = (128, 128, 128)
NAMES = (
  *('AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize'),
  *('Color', 'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY'),
  *('TranslateX', 'TranslateY', 'Cutout', 'SolarizeAdd'),
)


def _image(h=37, w=53, seed=0):
  """Smooth with some noise, and a different range in every channel."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:h, :w]
  waves = [np.sin(x / 9 + y / 14), np.cos(x / 17 - y / 5), np.sin(x * y / 300)]
  x = 120 + np.stack(waves, -1) * [70, 100, 40] + rng.normal(0, 9, (h, w, 3))
  return np.clip(x, 0, 255).astype(np.uint8)


# A channel that is flat, one of two values, and one that spans everything.
def _odd(h=20, w=30):
  x = np.zeros((h, w, 3), np.uint8)
  x[..., 0] = 77
  x[: h // 3, :, 1] = 200
  x[..., 2] = np.linspace(0, 255, h * w).reshape(h, w)
  return x


IMAGES = {'waves': _image(), 'odd': _odd(), 'small': _image(2, 3)}
images = pytest.mark.parametrize('x', IMAGES.values(), ids=IMAGES)
factors = pytest.mark.parametrize('factor', [0.1, 0.46, 1.0, 1.54, 1.9, 3.7])
signs = pytest.mark.parametrize('sign', [1.0, -1.0])


def _pil(fn, x, *args, **kwargs):
  return np.asarray(fn(Image.fromarray(x), *args, **kwargs))


def _check(got, want, atol=0):
  assert got.dtype == np.uint8
  difference = np.abs(got.astype(int) - want)
  assert difference.max() <= atol


@images
def test_autocontrast(x):
  # PIL's table is of products in float64, which fall short of some whole
  # numbers; ours is exact.
  _check(randaug.autocontrast(x), _pil(ImageOps.autocontrast, x), atol=1)


def test_autocontrast_is_exact():
  for low, high in ((0, 255), (3, 250), (100, 101), (0, 254), (17, 187)):
    x = np.arange(low, high + 1).astype(np.uint8)
    x = np.tile(x[None, :, None], (1, 1, 3))
    want = (x.astype(int) - low) * 255 // (high - low)
    _check(randaug.autocontrast(x), want)


@images
def test_equalize(x):
  _check(randaug.equalize(x), _pil(ImageOps.equalize, x))


def test_equalize_of_a_large_image():
  x = _image(300, 200)
  _check(randaug.equalize(x), _pil(ImageOps.equalize, x))


@images
def test_invert(x):
  _check(randaug.invert(x), _pil(ImageOps.invert, x))


@pytest.mark.parametrize('bits', range(1, 9))
def test_posterize(bits):
  x = IMAGES['odd']
  _check(randaug.posterize(x, bits), _pil(ImageOps.posterize, x, bits))


def test_posterize_keeps_one_to_eight_bits():
  x = IMAGES['odd']
  _check(randaug.posterize(x, 0), x & 128)
  _check(randaug.posterize(x, 12), x)


@pytest.mark.parametrize('threshold', [0, 1, 128, 255, 256, 384])
def test_solarize(threshold):
  x = IMAGES['odd']
  _check(
    randaug.solarize(x, threshold),
    _pil(ImageOps.solarize, x, threshold),
  )


@pytest.mark.parametrize('addition', [0, 55, 110, 165, 400])
def test_solarize_add(addition):
  x = IMAGES['odd']
  want = np.where(x < 128, np.minimum(x.astype(int) + addition, 255), x)
  _check(randaug.solarize_add(x, addition), want)


@images
@factors
@pytest.mark.parametrize(
  'name', ['Color', 'Contrast', 'Brightness', 'Sharpness']
)
def test_enhancements(x, factor, name):
  got = getattr(randaug, name.lower())(x, factor)
  want = np.asarray(
    getattr(ImageEnhance, name)(Image.fromarray(x)).enhance(factor)
  )
  # One level where the compiler of either contracts a product and a sum, so
  # that the cut fraction falls on the other side of a whole number.
  _check(got, want, atol=1)
  assert np.mean(got == want) > 0.999


def test_contrast_is_about_the_mean_of_the_image():
  dark, light = (
    np.full((4, 4, 3), 10, np.uint8),
    np.full((4, 4, 3), 200, np.uint8),
  )
  for x in (dark, light):
    _check(randaug.contrast(x, 1.9), x)


def test_contrast_of_a_huge_image():
  # The sum of its gray is above 2^31.
  x = np.full((3000, 3000, 3), 250, np.uint8)
  assert np.all(randaug.contrast(x, 1.9)[::500, ::500] == 250)


def _transform(x, name, level=10, sign=1.0, center=(0, 0)):
  """The transform, on an array that must stay; `center` is of Cutout."""
  x.setflags(write=False)
  at = tuple((c + 0.5) / n for c, n in zip(center, x.shape, strict=False))
  return randaug.transforms(level)[name](x, sign, at)


@images
@signs
@pytest.mark.parametrize('level', [0, 4, 10, 15])
def test_rotate(x, sign, level):
  got = _transform(x, 'Rotate', level, sign)
  want = _pil(
    Image.Image.rotate, x, sign * 3 * level, Image.NEAREST, fillcolor=GRAY
  )
  # PIL steps along a row in fixed point with 16 bits, so that a place halfway
  # between two pixels may fall to the other one.
  assert np.mean(np.any(got != want, -1)) <= 0.02


@images
@signs
@pytest.mark.parametrize('level', [0, 4, 8, 16])
@pytest.mark.parametrize('axis', 'XY')
def test_shear(x, sign, level, axis):
  got = _transform(x, f'Shear{axis}', level, sign)
  s = sign * 0.03 * level
  # PIL's coordinates are of the pixels' corners, half a pixel off.
  affine = (1, s, -s / 2, 0, 1, 0) if axis == 'X' else (1, 0, 0, s, 1, -s / 2)
  want = _pil(
    Image.Image.transform,
    x,
    (x.shape[1], x.shape[0]),
    Image.AFFINE,
    affine,
    Image.NEAREST,
    fillcolor=GRAY,
  )
  # Exactly, as these shears put no place halfway between two pixels.
  np.testing.assert_array_equal(got, want)


@signs
@pytest.mark.parametrize('level', [0, 0.7, 2, 10])
@pytest.mark.parametrize('axis', 'XY')
def test_translate(sign, level, axis):
  x = IMAGES['waves']
  got = _transform(x, f'Translate{axis}', level, sign)
  moved = np.full_like(x, 128)
  n = int(min(level * 10, 100))
  rows, gray = (
    np.moveaxis(x, 'YX'.index(axis), 0),
    np.moveaxis(moved, 'YX'.index(axis), 0),
  )
  if n < len(rows):
    if sign > 0:
      gray[: len(rows) - n] = rows[n:]
    else:
      gray[n:] = rows[: len(rows) - n]
  _check(got, moved)


@pytest.mark.parametrize('center', [(0, 0), (18, 26), (36, 52), (3, 50)])
@pytest.mark.parametrize('half', [0, 1, 7, 40])
def test_cutout(center, half):
  x = IMAGES['waves']
  want, (cy, cx) = x.copy(), center
  want[max(cy - half, 0) : cy + half, max(cx - half, 0) : cx + half] = 128
  at = tuple((c + 0.5) / n for c, n in zip(center, x.shape, strict=False))
  _check(randaug.cutout(x, half, at), want)


def test_magnitudes():
  x = IMAGES['waves']
  for level, bits, threshold, factor, half, add in (
    (10, 4, 256, 1.9, 40, 110),
    (5, 2, 128, 1.0, 20, 55),
    (15, 6, 384, 2.8, 60, 165),
    (0, 0, 0, 0.1, 0, 0),
  ):
    at = (5.5 / 37, 9.5 / 53)
    for name, want in {
      'AutoContrast': randaug.autocontrast(x),
      'Equalize': randaug.equalize(x),
      'Invert': randaug.invert(x),
      'Posterize': randaug.posterize(x, bits),
      'Solarize': randaug.solarize(x, threshold),
      'Color': randaug.color(x, factor),
      'Contrast': randaug.contrast(x, factor),
      'Brightness': randaug.brightness(x, factor),
      'Sharpness': randaug.sharpness(x, factor),
      'Cutout': randaug.cutout(x, half, at),
      'SolarizeAdd': randaug.solarize_add(x, add),
    }.items():
      got = _transform(x, name, level, 1.0, (5, 9))
      np.testing.assert_array_equal(got, want, f'{name} at {level}')


@pytest.mark.parametrize('shape', [(8, 5, 3), (1, 1, 3), (1, 6, 3), (2, 2, 3)])
@pytest.mark.parametrize('level', [0, 10, 20])
def test_shape_and_dtype_stay(shape, level):
  for name in NAMES:
    got = _transform(_image(*shape[:2]), name, level, center=(0, 0))
    assert got.shape == shape, name
    assert got.dtype == np.uint8, name


def test_a_warp_takes_the_nearest_pixel():
  x = np.random.default_rng(0).integers(0, 256, (61, 83, 3)).astype(np.uint8)
  y, z = np.mgrid[:61, :83]
  for degrees in (0, 7, -23, 90, 180):
    a = np.deg2rad(degrees)
    dy, dz = y - 30, z - 41
    rows = np.sin(a) * dz + np.cos(a) * dy + 30
    columns = np.cos(a) * dz - np.sin(a) * dy + 41
    inside = (np.abs(rows - 30) < 30.5) & (np.abs(columns - 41) < 41.5)
    rows, columns = (np.rint(n).astype(int) for n in (rows, columns))
    want = x[rows.clip(0, 60), columns.clip(0, 82)]
    want = np.where(inside[..., None], want, 128)
    assert np.mean(randaug.rotate(x, degrees) != want) < 1e-3


@pytest.mark.parametrize('shape', [(1, 40_000, 3), (40_000, 2, 3)])
def test_an_image_that_is_longer_than_opencvs_maps(shape):
  x = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  for name in NAMES:
    assert _transform(x, name).shape == shape
  want = np.full_like(x, 128)
  if shape[1] > 2:
    want[:, :-100] = x[:, 100:]
  np.testing.assert_array_equal(_transform(x, 'TranslateX'), want)


# --- The draws. The image is large enough for Equalize to find levels and for
# the weakest shear to move a row, and the level weak enough that each transform
# gives a result of its own.

X = _image(24, 24)
MANY = 3200


@functools.cache
def _dataset(pp):
  """A function of (first seed, n) that returns n results for X, [n, ...]."""
  fn = get_preprocess_fn(pp)
  x = tf.constant(X)

  # Traced once, and not at each call of `run`.
  @tf.function(autograph=False)
  def apply(i):
    return fn({'image': x}, tf.stack([3, i]))['image']

  def run(start, n):
    data = tf.data.Dataset.range(start, start + n, output_type=tf.int32)
    data = data.map(apply, num_parallel_calls=2).batch(n)
    return next(data.as_numpy_iterator())

  return run


@pytest.fixture(scope='module')
def one_layer():
  return _dataset('randaug(1, 1)')(0, MANY)


@pytest.fixture(scope='module')
def two_layers():
  return _dataset('randaug(2, 10)')(0, 200)


@pytest.fixture(scope='module')
def names():
  """The transform of each result that one layer may have, but Cutout's."""
  return {
    _transform(X, name, 1, sign).tobytes(): name
    for sign in (1.0, -1.0)
    for name in NAMES
    if name != 'Cutout'
  }


def test_each_transform_is_drawn_as_often_as_any_other(one_layer, names):
  # Ten go one way, five go two.
  assert len(names) == 20
  results = collections.Counter(out.tobytes() for out in one_layer)
  counts = collections.Counter()
  for out, n in results.items():
    counts[names.get(out, 'Cutout')] += n
  assert counts.keys() == set(NAMES)
  # Chi-squared with 15 degrees of freedom exceeds 37.7 once in a thousand.
  mean = MANY / 16
  assert sum((n - mean) ** 2 / mean for n in counts.values()) < 37.7
  for name in ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY'):
    ways = [n for out, n in results.items() if names.get(out) == name]
    # Four standard deviations: √(200 / 4) = 7.
    assert len(ways) == 2 and abs(ways[0] - counts[name] / 2) < 28


def test_cutouts_center_is_anywhere(one_layer, names):
  holes = np.zeros(X.shape[:2])
  for out in one_layer:
    if out.tobytes() not in names:
      holes += np.any(out != X, -1)
  # Half-size 4: of the 24² centers, 8² cover the middle and about 4² a corner.
  assert holes.min() > 0
  assert holes[12, 12] > 2 * holes[0, 0]


def test_solarize_at_ten_leaves_the_image():
  out = _dataset('randaug(1, 10)')(0, 800)
  kept = np.mean(np.all(out == X, (1, 2, 3)))
  # 1/16, within four standard deviations of √(1/16 · 15/16 / 800) = 0.0086.
  assert abs(kept - 1 / 16) < 0.035


def test_layers_draw_apart(two_layers):
  # If both layers drew the same, there would be one result a transform, and
  # a few more for Cutout.
  assert len({out.tobytes() for out in two_layers}) > 80


def test_no_layers():
  assert np.array_equal(_dataset('randaug(0)')(0, 1)[0], X)


def test_same_seed_same_image(two_layers):
  again = _dataset('randaug(2, 10)')(0, 200)
  np.testing.assert_array_equal(two_layers, again)
  # Different layers, now and then, end in the same blank image.
  same = np.all(two_layers[:100] == two_layers[100:], (1, 2, 3))
  assert np.mean(same) < 0.3
  fn = get_preprocess_fn('randaug(2, 10)')
  for i in range(0, 200, 20):
    eager = fn({'image': tf.constant(X)}, tf.constant([3, i]))['image']
    np.testing.assert_array_equal(eager, two_layers[i])


def test_shape_is_static_as_far_as_it_was():
  fn = get_preprocess_fn('randaug(1)')
  for shape in ([None, None, 3], [8, 9, 3]):
    data = tf.data.Dataset.from_generator(
      list, output_signature=tf.TensorSpec(shape, tf.uint8)
    )
    data = data.map(lambda x: fn({'image': x}, (1, 2)))
    assert data.element_spec['image'] == tf.TensorSpec(shape, tf.uint8)


@pytest.mark.parametrize(
  'x', [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 1), np.uint8)]
)
def test_other_images(x):
  fn = get_preprocess_fn('randaug')
  with pytest.raises(
    ConfigError, match=r'pp op 1 \(randaug\).* works on uint8'
  ):
    fn({'image': tf.constant(x)}, (1, 2))


@pytest.mark.parametrize('arguments', ['-1', '2.5', '"a"', '2, -1', '2, "a"'])
def test_arguments(arguments):
  with pytest.raises(ConfigError, match=r'pp op 1 \(randaug\)'):
    get_preprocess_fn(f'randaug({arguments})')
