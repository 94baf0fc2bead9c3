"""Decoding, resizing, cropping, flipping."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.builder import get_preprocess_fn

SEED = (1, 2)


def _image(h=40, w=60):
  """Smooth, with something else in every channel."""
  y, x = np.mgrid[:h, :w]
  planes = [np.sin(x / 9 + y / 14), np.cos(x / 17 - y / 5), np.sin(x * y / 300)]
  return (128 + 100 * np.stack(planes, -1)).astype(np.uint8)


def _coordinates(h, w):
  """An image whose pixels say where they are: (y, x, 0)."""
  y, x = np.mgrid[:h, :w]
  return np.stack([y, x, 0 * x], -1).astype(np.uint8)


def _encode(x, file_format, **kwargs):
  buffer = io.BytesIO()
  Image.fromarray(x).save(buffer, file_format, **kwargs)
  return buffer.getvalue()


def _pil(contents, mode='RGB'):
  return np.asarray(Image.open(io.BytesIO(contents)).convert(mode))


def _run(pp, image, seed=SEED):
  return get_preprocess_fn(pp)({'image': tf.constant(image)}, seed)['image']


def _many(pp, image, n):
  """n results, one a seed."""
  fn = get_preprocess_fn(pp)
  x = tf.constant(image)
  data = tf.data.Dataset.range(n).map(
    lambda i: fn({'image': x}, tf.stack([i, 7])), num_parallel_calls=2
  )
  return [d['image'] for d in data.as_numpy_iterator()]


def _static(pp, shape, dtype=tf.uint8):
  """The static shape that the op gives to an image of a static shape."""
  fn = get_preprocess_fn(pp)
  # The seed is an input too: TensorFlow computes with one that is a constant.
  data = tf.data.Dataset.from_generator(
    list,
    output_signature=(
      tf.TensorSpec(shape, dtype),
      tf.TensorSpec([2], tf.int64),
    ),
  )
  data = data.map(lambda x, seed: fn({'image': x}, seed))
  return data.element_spec['image'].shape.as_list()


# --- decode


@pytest.mark.parametrize(
  'file_format, precise', [('PNG', False), ('PNG', True), ('BMP', False)]
)
def test_decode_is_lossless(file_format, precise):
  x = _image()
  got = _run(f'decode(precise={precise})', _encode(x, file_format))
  assert got.dtype == tf.uint8
  np.testing.assert_array_equal(got, x)


def test_decode_gif_takes_the_first_frame():
  frames = [Image.fromarray(_image(20, 30)[..., i]) for i in range(3)]
  buffer = io.BytesIO()
  frames[0].save(buffer, 'GIF', save_all=True, append_images=frames[1:])
  got = _run('decode', buffer.getvalue())
  np.testing.assert_array_equal(got, _pil(buffer.getvalue()))


def test_decode_jpeg():
  contents = _encode(_image(), 'JPEG', quality=90)
  got = _run('decode', contents).numpy().astype(int)
  # The fast cosine transform is a few levels off.
  assert np.abs(got - _pil(contents)).max() <= 8
  assert np.abs(got - _pil(contents)).mean() < 1.5


def test_decode_jpeg_precisely():
  contents = _encode(_image(), 'JPEG', quality=90)
  np.testing.assert_array_equal(
    _run('decode(precise=True)', contents), _pil(contents)
  )


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG'])
def test_decode_gray(file_format):
  contents = _encode(_image(28, 28)[..., 0], file_format)
  got = _run('decode(channels=1, precise=True)', contents)
  assert got.shape == (28, 28, 1)
  np.testing.assert_array_equal(got[..., 0], _pil(contents, 'L'))
  rgb = _run('decode', contents)
  assert rgb.shape == (28, 28, 3)
  np.testing.assert_array_equal(rgb[..., 0], rgb[..., 2])
  np.testing.assert_array_equal(
    _run('decode(1)', contents)[..., 0], rgb[..., 1]
  )


@pytest.mark.parametrize('channels', [0, 1, 3, 4])
def test_decode_shape(channels):
  assert _static(f'decode({channels})', [], tf.string) == [
    *(None, None),
    channels or None,
  ]
  contents = _encode(_image(5, 7), 'PNG')
  assert _run(f'decode({channels})', contents).shape == (5, 7, channels or 3)


def test_decode_channels():
  with pytest.raises(ConfigError, match='channels must be 0, 1, 3 or 4, not 2'):
    get_preprocess_fn('decode(2)')


# --- resize


def _bilinear(x, h, w):
  """Two linear interpolations between pixels' middles, in float64."""
  for axis, n in ((0, h), (1, w)):
    size = x.shape[axis]
    place = np.clip((np.arange(n) + 0.5) * size / n - 0.5, 0, size - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, size - 1)
    part = np.expand_dims(place - low, tuple({0, 1, 2} - {axis}))
    x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
  return x


@pytest.mark.parametrize('h, w', [(40, 60), (80, 120), (33, 47), (10, 100)])
def test_resize(h, w):
  x = _image()
  want = _bilinear(x.astype(float), h, w)
  got = _run(f'resize(({h}, {w}))', x.astype(np.float32))
  assert got.dtype == tf.float32
  np.testing.assert_allclose(got, want, atol=1e-3)
  got = _run(f'resize([{h}, {w}])', x)
  assert got.dtype == tf.uint8
  # The fraction is cut off, and not rounded: within the float's error, floor.
  assert np.all((got <= want + 1e-3) & (got > want - 1 - 1e-3))


def test_resize_to_a_square():
  assert _run('resize(32)', _image()).shape == (32, 32, 3)


@pytest.mark.parametrize('method', ['bilinear', 'bicubic', 'lanczos3'])
def test_resize_antialias(method):
  x = _image()
  got = _run(f'resize((20, 25), "{method}", True)', x).numpy().astype(int)
  resample = Image.Resampling[method.removesuffix('3').upper()]
  want = np.asarray(Image.fromarray(x).resize((25, 20), resample))
  # PIL rounds after each axis, where we cut off once; and its cubic is another
  # member (a = −0.75 for −0.5) of the same family.
  assert np.abs(got - want).max() <= (2 if method != 'bicubic' else 4)


def test_resize_nearest_makes_no_new_values():
  x = np.random.default_rng(0).choice([3, 200], (9, 9, 1)).astype(np.int32)
  got = _run('resize(20, method="nearest")', x)
  assert got.dtype == tf.int32
  rows = ((np.arange(20) + 0.5) * 9 / 20).astype(int)
  np.testing.assert_array_equal(got, x[rows][:, rows])


def test_resize_does_not_overflow():
  x = np.zeros((8, 8, 1), np.uint8)
  x[2:6, 2:6] = 255
  got = _run('resize(21, "bicubic")', x).numpy()
  wide = _run('resize(21, "bicubic")', x.astype(np.float32)).numpy()
  assert wide.min() < -1 and wide.max() > 256
  # A hair more than what is cut off, so that 255 does not come out as 254.
  wide = np.clip(wide * (1 + 2.0**-20), 0, 255)
  np.testing.assert_array_equal(got, wide.astype(np.uint8))


@pytest.mark.parametrize('shape', [[40, 60, 3], [None, None, 3]])
@pytest.mark.parametrize(
  'size, h, w', [(20, 20, 30), (25, 25, 38), (80, 80, 120), (1, 1, 2)]
)
def test_resize_small(shape, size, h, w):
  # Of the means of whole blocks only, area is easily told otherwise.
  fn = get_preprocess_fn(f'resize_small({size})')
  for x in (_image(), _image().transpose(1, 0, 2)):
    spec = [n and m for n, m in zip(shape, x.shape, strict=True)]
    traced = tf.function(
      lambda image: fn({'image': image}, SEED)['image'],
      input_signature=[tf.TensorSpec(spec, tf.uint8)],
    )
    got = traced(x).numpy()
    assert got.shape == ((h, w, 3) if len(x) == 40 else (w, h, 3))
    if size == 20:
      want = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3))
      # In float32 a mean of .75 or so is exact, and the fraction is cut off.
      np.testing.assert_array_equal(got, np.floor(want))


@pytest.mark.parametrize('shape', [[40, 60, 3], [None, None, 3]])
@pytest.mark.parametrize(
  'size, h, w', [(30, 20, 30), (38, 25, 38), (120, 80, 120), (2, 1, 2)]
)
def test_resize_long(shape, size, h, w):
  fn = get_preprocess_fn(f'resize_long({size})')
  for x in (_image(), _image().transpose(1, 0, 2)):
    want = (h, w) if len(x) == 40 else (w, h)
    got = fn({'image': tf.constant(x)}, SEED)['image']
    np.testing.assert_array_equal(got, _run(f'resize({want}, "area")', x))


def test_resize_long_keeps_a_pixel_of_the_other_side():
  assert _run('resize_long(8)', _image(2, 60)).shape == (1, 8, 3)


@pytest.mark.parametrize(
  'pp',
  ['resize(8, "bilinea")', 'resize_small(8, "x")', 'resize_long(8, "x")'],
)
def test_resize_method(pp):
  with pytest.raises(ConfigError, match='resize method'):
    get_preprocess_fn(pp)


@pytest.mark.parametrize(
  'size', ['0', '-1', '2.5', '"8"', '(1, 2, 3)', '(4, 0)']
)
@pytest.mark.parametrize(
  'op',
  [
    *('resize', 'resize_small', 'resize_long', 'random_crop', 'central_crop'),
    'inception_crop',
  ],
)
def test_sizes(op, size):
  with pytest.raises(ConfigError, match='a size is a whole number of pixels'):
    get_preprocess_fn(f'{op}({size})')


# --- crops


@pytest.mark.parametrize('h, w', [(40, 60), (39, 61), (20, 20), (21, 20)])
def test_central_crop(h, w):
  x = _coordinates(h, w)
  y, z = (h - 20) // 2, (w - 11) // 2
  np.testing.assert_array_equal(
    _run('central_crop((20, 11))', x), x[y : y + 20, z : z + 11]
  )
  side = min(h, w)
  y, z = (h - side) // 2, (w - side) // 2
  np.testing.assert_array_equal(
    _run('central_crop', x), x[y : y + side, z : z + side]
  )


def _rectangle(crop):
  """(y, x, height, width) of a crop of `_coordinates`, checked to be one."""
  h, w, _ = crop.shape
  y, x, _ = (int(n) for n in crop[0, 0])
  want = _coordinates(y + h, x + w)[y:, x:]
  np.testing.assert_array_equal(crop, want)
  return y, x, h, w


def test_random_crop_is_evenly_placed():
  crops = [
    _rectangle(c)
    for c in _many('random_crop((8, 5))', _coordinates(10, 9), 1500)
  ]
  assert {c[2:] for c in crops} == {(8, 5)}
  counts = np.zeros((3, 5))
  for y, x, _, _ in crops:
    counts[y, x] += 1
  # Chi-squared with 14 degrees of freedom exceeds 36.1 once in a thousand.
  assert np.sum((counts - 100) ** 2 / 100) < 36.1


def test_random_crop_of_all():
  x = _coordinates(8, 5)
  np.testing.assert_array_equal(_run('random_crop((8, 5))', x), x)


@pytest.mark.parametrize('op', ['central_crop', 'random_crop'])
def test_a_crop_larger_than_the_image(op):
  words = 'a crop of 8 x 9 is larger than the image'
  with pytest.raises(ConfigError, match=rf'pp op 1 \({op}\).*{words}'):
    _run(f'{op}((8, 9))', _image(8, 8))
  with pytest.raises(ConfigError, match=words):
    _static(f'{op}((8, 9))', [None, 8, 3])
  fn = get_preprocess_fn(f'{op}((8, 9))')
  for h, w in ((8, 8), (7, 9)):
    data = tf.data.Dataset.from_tensors(_encode(_image(h, w), 'PNG'))
    data = data.map(
      lambda x: fn({'image': tf.io.decode_png(x, channels=3)}, SEED)
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=words) as e:
      list(data)
    assert f'which is {h} x {w}; put a resize before it' in str(e.value)


@pytest.mark.parametrize(
  'op', ['inception_crop', 'decode_jpeg_and_inception_crop']
)
def test_inception_crops_area_and_ratio(op):
  h, w = 120, 200
  image = _coordinates(h, w)
  image = image if op == 'inception_crop' else _encode(image, 'PNG')
  crops = [
    _rectangle(c) for c in _many(f'{op}(area_min=20, area_max=60)', image, 500)
  ]
  y, x, height, width = np.array(crops).T
  assert np.all(y + height <= h) and np.all(x + width <= w)
  area, ratio = height * width / (h * w), width / height
  # A side is rounded to pixels: 1 in 50.
  assert np.all((area > 0.2 * 0.97) & (area < 0.6 * 1.03))
  assert np.all((ratio > 0.75 * 0.97) & (ratio < 1.33 * 1.03))
  # Spread over the ranges, and over the image.
  assert area.min() < 0.24 and area.max() > 0.52
  assert ratio.min() < 0.8 and ratio.max() > 1.25
  assert y.min() == 0 and x.max() + width[np.argmax(x)] > 190
  assert len(set(crops)) > 490


def test_inception_crop_with_a_ratio():
  pp = 'decode_jpeg_and_inception_crop(None, 10, 30, 2, 2.5)'
  crops = _many(pp, _encode(_coordinates(200, 200), 'PNG'), 100)
  for _, _, height, width in map(_rectangle, crops):
    assert 1.95 < width / height < 2.55


def test_inception_crop_resizes():
  x = _image()
  seeds = [(i, 3) for i in range(5)]
  for seed in seeds:
    crop = _run('inception_crop', x, seed)
    want = _run('resize((16, 9), "area")', crop)
    got = _run('inception_crop((16, 9), method="area")', x, seed)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('size', ['', '32'])
def test_decode_and_crop_is_decode_then_crop(size):
  contents = _encode(_image(90, 120), 'JPEG', quality=90)
  for seed in [(i, 3) for i in range(5)]:
    got = _run(f'decode_jpeg_and_inception_crop({size})', contents, seed)
    want = _run(f'decode|inception_crop({size})', contents, seed)
    assert got.shape == want.shape
    # At the crop's edge the color of a neighbor outside is not there to smooth
    # with.
    difference = np.abs(got.numpy().astype(int) - want.numpy())
    assert difference.mean() < 0.3 and difference.max() < 40


def test_decode_and_crop_of_digits():
  x = _coordinates(28, 28)[..., 0]
  got = _run('decode_jpeg_and_inception_crop', _encode(x, 'PNG'))
  assert got.shape[-1] == 3 and got.dtype == tf.uint8
  np.testing.assert_array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize(
  'arguments, words',
  [
    ('area_min=0', '0 < area_min <= area_max <= 100'),
    ('area_min=50, area_max=40', 'got 50 and 40'),
    ('area_max=101', '0 < area_min <= area_max <= 100'),
    ('ratio_min=2', '0 < ratio_min <= ratio_max'),
    ('method="x"', 'resize method'),
  ],
)
def test_inception_crop_arguments(arguments, words):
  with pytest.raises(ConfigError, match=words):
    get_preprocess_fn(f'decode_jpeg_and_inception_crop(8, {arguments})')


# --- flips, and what all random ops promise


def test_flip_lr():
  x = _coordinates(4, 6)
  flips = 0
  for out in _many('flip_lr', x, 1000):
    flipped = np.array_equal(out, x[:, ::-1])
    assert flipped or np.array_equal(out, x)
    flips += flipped
  assert abs(flips - 500) < 64  # Four standard deviations.


RANDOM = ['flip_lr', 'random_crop(9)', 'inception_crop', 'inception_crop(9)']


@pytest.mark.parametrize('op', RANDOM)
def test_random_ops_are_functions_of_the_seed(op):
  x = _coordinates(30, 40)
  data = _many(op, x, 24)
  for i in range(0, 24, 4):
    np.testing.assert_array_equal(_run(op, x, (i, 7)), data[i])
  assert len({(d.shape, d.tobytes()) for d in data}) > (
    1 if op == 'flip_lr' else 20
  )


def test_the_same_op_twice_draws_twice():
  x = _coordinates(40, 40)
  fn = get_preprocess_fn(
    'copy("image", "b")|random_crop(5)|random_crop(5, key="b")'
  )
  same = 0
  for i in range(20):
    out = fn({'image': tf.constant(x)}, (i, 5))
    same += np.array_equal(out['image'], out['b'])
  assert same < 3


@pytest.mark.parametrize(
  'pp, given, want',
  [
    ('resize(8)', [None, None, 3], [8, 8, 3]),
    ('resize((8, 9), "bicubic")', [None, None, 1], [8, 9, 1]),
    ('resize_small(8)', [None, None, 3], [None, None, 3]),
    ('resize_small(8)', [32, 40, 3], [8, 10, 3]),
    ('resize_long(8)', [32, 40, 3], [6, 8, 3]),
    ('resize_long(8)', [None, 40, 3], [None, None, 3]),
    ('inception_crop(8)', [None, 32, 1], [8, 8, 1]),
    ('inception_crop(8)', [None, None, 3], [8, 8, 3]),
    ('inception_crop', [32, 32, 3], [None, None, 3]),
    ('random_crop(8)', [None, None, 3], [8, 8, 3]),
    ('central_crop(8)', [None, None, 3], [8, 8, 3]),
    ('central_crop', [None, None, 3], [None, None, 3]),
    ('central_crop', [32, 40, 3], [32, 32, 3]),
    ('flip_lr', [None, 8, 3], [None, 8, 3]),
    ('value_range', [8, 9, 3], [8, 9, 3]),
  ],
)
def test_static_shapes(pp, given, want):
  assert _static(pp, given) == want


def test_static_shapes_of_whole_chains():
  train = 'decode_jpeg_and_inception_crop(8)|flip_lr|randaug(1)|value_range'
  assert _static(train, [], tf.string) == [8, 8, 3]
  test = 'decode(1)|resize_small(9)|central_crop(8)|value_range'
  assert _static(test, [], tf.string) == [8, 8, 1]
  crop = 'decode_jpeg_and_inception_crop'
  assert _static(crop, [], tf.string) == [None, None, 3]


# --- odd images


def _odd_files():
  rgb = Image.fromarray(_image(30, 40))
  gray = rgb.convert('L')
  wide = np.asarray(gray).astype(np.uint16) * 257
  files = {
    'gray JPEG': (gray, 'JPEG'),
    'CMYK JPEG': (rgb.convert('CMYK'), 'JPEG'),
    'RGBA PNG': (rgb.convert('RGBA'), 'PNG'),
    'gray and alpha PNG': (gray.convert('LA'), 'PNG'),
    '16-bit PNG': (Image.fromarray(wide), 'PNG'),
    'palette PNG': (rgb.convert('P'), 'PNG'),
    'one-bit PNG': (gray.convert('1'), 'PNG'),
    'GIF': (rgb.convert('P'), 'GIF'),
    'BMP': (rgb, 'BMP'),
    'one pixel': (rgb.crop((0, 0, 1, 1)), 'JPEG'),
    'one pixel PNG': (rgb.crop((0, 0, 1, 1)), 'PNG'),
    'wide': (rgb.resize((3000, 2)), 'JPEG'),
    'high': (rgb.resize((2, 3000)), 'PNG'),
  }
  out = {}
  for name, (image, file_format) in files.items():
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    out[name] = image, buffer.getvalue()
  return out


ODD = _odd_files()
odd = pytest.mark.parametrize('name', ODD)


@odd
def test_decode_odd_files(name):
  image, contents = ODD[name]
  want = _pil(contents).astype(int)
  if name == '16-bit PNG':  # Which PIL does not convert.
    want = np.asarray(image)[..., None] // 257 + np.zeros(3, int)
  got = _run('decode', contents).numpy()
  assert got.shape == want.shape
  difference = np.abs(got - want)
  if 'PNG' in name or name in ('GIF', 'BMP', 'high'):
    assert difference.max() == 0
  else:
    assert difference.mean() < 3


@odd
@pytest.mark.parametrize(
  'pp, shape',
  [
    ('decode_jpeg_and_inception_crop(16)|flip_lr|randaug(3)', (16, 16, 3)),
    ('decode|resize_small(16)|central_crop(12)', (12, 12, 3)),
    ('decode|resize(14)|random_crop((12, 9))', (12, 9, 3)),
    ('decode|inception_crop((7, 8))|randaug(3)', (7, 8, 3)),
    ('decode|randaug(16)|resize_long(9)|resize(4)', (4, 4, 3)),
    ('decode|central_crop|flip_lr|resize(5, "lanczos3", True)', (5, 5, 3)),
  ],
)
def test_lines_on_odd_files(name, pp, shape):
  _, contents = ODD[name]
  for i in range(3):
    got = _run(pp, contents, (i, 1))
    assert got.shape == shape and got.dtype == tf.uint8


@pytest.mark.parametrize('contents', [b'', b'no image', ODD['wide'][1][:900]])
@pytest.mark.parametrize(
  'pp', ['decode', 'decode_jpeg_and_inception_crop(8)|flip_lr']
)
def test_what_is_no_image(pp, contents):
  data = tf.data.Dataset.from_tensors(contents)
  data = data.map(lambda x: get_preprocess_fn(pp)({'image': x}, SEED))
  with pytest.raises(tf.errors.InvalidArgumentError):
    list(data)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32, np.int32])
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 7])
def test_any_dtype_and_channels(dtype, channels):
  x = np.random.default_rng(0).integers(0, 255, (9, 12, channels))
  pp = 'resize_small(6)|central_crop(5)|resize(8)|flip_lr|random_crop(4)'
  got = _run(pp, x.astype(dtype))
  assert got.shape == (4, 4, channels) and got.dtype == dtype
  flips = {out.tobytes() for out in _many('flip_lr', x.astype(dtype), 20)}
  assert flips == {
    x.astype(dtype).tobytes(),
    x[:, ::-1].astype(dtype).tobytes(),
  }


def test_flip_lr_of_a_video():
  x = np.random.default_rng(0).integers(0, 255, (2, 4, 5, 3)).astype(np.uint8)
  flips = {out.tobytes() for out in _many('flip_lr', x, 20)}
  assert flips == {x.tobytes(), x[:, :, ::-1].tobytes()}
