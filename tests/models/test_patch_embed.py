"""PatchEmbed against formulas in float64, a convolution, and hard patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from big_vision_dpn.config import ConfigError
from big_vision_dpn.models.patch_embed import PatchEmbed, cut_patches

HP, WP, CHANNELS, WIDTH = 4, 6, 3, 40
SHAPE = (5, 3 * HP, 2 * WP, CHANNELS)
EPS = 1e-6


def _embed(patch_norm, dtype_mm='float32', patch_norm_type='layernorm'):
  return PatchEmbed(WIDTH, (HP, WP), patch_norm, patch_norm_type, dtype_mm)


def _random_params(model, image, seed=0):
  """Parameters far from their initial zeros and ones."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  return jax.tree.map(
    lambda a: rng.normal(0.5, 0.4, a.shape).astype(np.float32), shapes
  )


def _images(kind):
  rng = np.random.default_rng(1)
  noise = rng.normal(size=SHAPE)
  level = rng.uniform(-1, 1, (SHAPE[0], 1, 1, 1))
  image = {
    'noise': noise,
    'natural': level + 0.05 * noise.cumsum(axis=1).cumsum(axis=2),
    'near-constant': level + 1e-3 * noise,
    'nearly all constant': level + 1e-5 * noise,
    'constant': level + 0 * noise,
    'one step of 8 bits': np.round(90 + 40 * level + 0.5 * noise) / 127.5 - 1,
  }[kind]
  return image.astype(np.float32)


KINDS = ('noise', 'natural', 'near-constant', 'one step of 8 bits')
FLAT_KINDS = ('nearly all constant', 'constant')


def _cut(image):
  """Patches by slicing, in row order: (n, h / HP, w / WP, HP * WP * c)."""
  n, h, w, _ = image.shape
  rows = [
    [image[:, y : y + HP, x : x + WP].reshape(n, -1) for x in range(0, w, WP)]
    for y in range(0, h, HP)
  ]
  return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def _uncut(patches, shape):
  """The inverse of _cut."""
  image = np.zeros(shape, patches.dtype)
  for i, y in enumerate(range(0, shape[1], HP)):
    for j, x in enumerate(range(0, shape[2], WP)):
      image[:, y : y + HP, x : x + WP] = patches[:, i, j].reshape(
        shape[0], HP, WP, shape[3]
      )
  return image


def _norm(x, p, norm_type):
  """The norm, and a function of its gradient: of x, scale and bias."""
  if norm_type == 'only_learnable':
    hat, std = x, 1
  elif norm_type == 'rmsnorm':
    std = np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    hat = x / std
  else:
    std = np.sqrt(x.var(axis=-1, keepdims=True) + EPS)
    hat = (x - x.mean(axis=-1, keepdims=True)) / std
  scale = p.get('scale', 1)

  def gradient(g):
    g_hat = g * scale
    along = hat * (g_hat * hat).mean(axis=-1, keepdims=True)
    centre = g_hat.mean(axis=-1, keepdims=True)
    g_x = {
      'only_learnable': lambda: g_hat,
      'rmsnorm': lambda: (g_hat - along) / std,
    }.get(norm_type, lambda: (g_hat - centre - along) / std)()
    sums = tuple(range(g.ndim - 1))
    return g_x, {'scale': (g * hat).sum(sums), 'bias': g.sum(sums)}

  return hat * scale + p.get('bias', 0), gradient


def _formula(params, image, direction, norm_type='layernorm'):
  """Norm, matrix, norm, and backpropagation of sum(direction · ·)."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  # A norm that the parameters do not show is one without parameters.
  shown = norm_type != 'no_learnable'
  inner = 'ln0' in p or not shown
  outer = 'ln1' in p or not shown
  patches, grads = _cut(image.astype(np.float64)), {}
  x, y_grad = patches, direction
  if inner:
    x, inner_gradient = _norm(patches, p.get('ln0', {}), norm_type)
  y = z = x @ p['dense']['kernel'] + p['dense']['bias']
  if outer:
    z, gradient = _norm(y, p.get('ln1', {}), norm_type)
    y_grad, grads['ln1'] = gradient(direction)
  x_grad = y_grad @ p['dense']['kernel'].T
  if inner:
    x_grad, grads['ln0'] = inner_gradient(x_grad)
  grads['dense'] = {
    'kernel': np.einsum('nhwi,nhwo->io', x, y_grad),
    'bias': y_grad.sum((0, 1, 2)),
  }
  grads['image'] = _uncut(x_grad, image.shape)
  return z, traverse_util.flatten_dict(grads, sep='/')


@functools.partial(jax.jit, static_argnums=0)
def _apply_and_grad(model, params, image, direction):
  def loss(params, image):
    y = model.apply({'params': params}, image)
    return (y.astype(jnp.float32) * direction).sum(), y

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, image)


def _value_and_grads(model, params, image, direction):
  (g_params, g_image), y = _apply_and_grad(model, params, image, direction)
  grads = traverse_util.flatten_dict(g_params, sep='/')
  return np.asarray(y, np.float64), {**grads, 'image': g_image}


def _error(actual, expected):
  """Relative RMS error; absolute where zero is expected."""
  actual = np.asarray(actual, np.float64)
  size = (expected**2).mean() or 1
  return np.sqrt(((actual - expected) ** 2).mean() / size)


def _compare_with_formula(
  kind, dtype_mm, patch_norm='dual', norm_type='layernorm'
):
  image = _images(kind)
  model = _embed(patch_norm, dtype_mm, norm_type)
  params = _random_params(model, image)
  direction = np.random.default_rng(2).normal(size=(5, 3, 2, WIDTH))
  y, grads = _value_and_grads(model, params, image, direction)
  expected_y, expected_grads = _formula(params, image, direction, norm_type)
  return _error(y, expected_y), {
    name: _error(g, expected_grads[name]) for name, g in grads.items()
  }


@pytest.mark.parametrize('kind', KINDS + FLAT_KINDS)
def test_dpn_is_the_formula(kind):
  error, errors = _compare_with_formula(kind, 'float32')
  assert error < 1e-5
  assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize('kind', KINDS)
def test_dpn_in_bfloat16_keeps_its_two_digits(kind):
  """On near-constant patches only if ln0 sees the image before rounding."""
  error, errors = _compare_with_formula(kind, 'bfloat16')
  assert error < 1e-2
  assert max(errors.values()) < 3e-2, errors


ABLATIONS = [
  ('pre', 'layernorm'),
  ('post', 'layernorm'),
  ('dual', 'rmsnorm'),
  ('dual', 'only_learnable'),
  ('dual', 'no_learnable'),
]


@pytest.mark.parametrize('kind', ['natural', 'near-constant', 'constant'])
@pytest.mark.parametrize(('patch_norm', 'norm_type'), ABLATIONS)
def test_ablations_are_their_formulas(patch_norm, norm_type, kind):
  error, errors = _compare_with_formula(kind, 'float32', patch_norm, norm_type)
  assert error < 1e-5
  assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize('kind', ['natural', 'near-constant'])
@pytest.mark.parametrize(('patch_norm', 'norm_type'), ABLATIONS)
def test_ablations_in_bfloat16(patch_norm, norm_type, kind):
  error, errors = _compare_with_formula(kind, 'bfloat16', patch_norm, norm_type)
  assert error < 1.5e-2
  assert max(errors.values()) < 5e-2, errors


@pytest.mark.parametrize(
  ('patch_norm', 'norm_type'), [('dual', 'layernorm'), *ABLATIONS]
)
def test_float64_backpropagation_is_right(patch_norm, norm_type):
  """The closed form of this file against finite differences."""
  image = _images('natural').astype(np.float64)
  model = _embed(patch_norm, patch_norm_type=norm_type)
  params = _random_params(model, image)
  rng = np.random.default_rng(3)
  direction = rng.normal(size=(5, 3, 2, WIDTH))
  _, grads = _formula(params, image, direction, norm_type)

  def loss(flat, image):
    params = traverse_util.unflatten_dict(flat, sep='/')
    y, _ = _formula(params, image, direction, norm_type)
    return (y * direction).sum()

  flat = traverse_util.flatten_dict(params, sep='/')
  point = {
    **{k: np.asarray(v, np.float64) for k, v in flat.items()},
    'image': image,
  }
  for name in point:
    grad = grads[name]
    step = 1e-5 * rng.normal(size=grad.shape)
    up, down = (dict(point, **{name: point[name] + s}) for s in (step, -step))
    difference = loss(up, up.pop('image')) - loss(down, down.pop('image'))
    assert difference / 2 == pytest.approx((grad * step).sum(), rel=1e-5), name


def test_constant_patches_embed_alike():
  """Rounding in ln0's mean must not reach ln1, which would enlarge it."""
  model = _embed('dual')
  levels = np.arange(256, dtype=np.float32) / 127.5 - 1
  image = np.ones((256, HP, WP, CHANNELS), np.float32)
  image *= levels[:, None, None, None]
  params = _random_params(model, image)
  y = jax.jit(model.apply)({'params': params}, image)
  np.testing.assert_array_equal(y, y[:1].repeat(256, axis=0))


def _conv(params, image):
  y = jax.lax.conv_general_dilated(
    image,
    params['kernel'],
    window_strides=(HP, WP),
    padding='VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return y + params['bias']


def test_plain_is_big_visions_convolution():
  image = _images('natural')
  model = _embed('none')
  params = _random_params(model, image)
  direction = np.random.default_rng(2).normal(size=(5, 3, 2, WIDTH))
  y, grads = _value_and_grads(model, params, image, direction)

  def loss(params, image):
    return (_conv(params, image) * direction).sum()

  g_params, g_image = jax.grad(loss, argnums=(0, 1))(params, image)
  assert _error(y, np.asarray(_conv(params, image), np.float64)) < 1e-6
  for name, g in {**g_params, 'image': g_image}.items():
    assert _error(grads[name], np.asarray(g, np.float64)) < 1e-6, name


def test_parameters_and_their_initial_values():
  image = jnp.zeros(SHAPE)
  d = HP * WP * CHANNELS
  plain, dual = (
    jax.jit(_embed(norm).init)(jax.random.key(0, impl='rbg'), image)['params']
    for norm in ('none', 'dual')
  )
  assert jax.tree.map(jnp.shape, plain) == {
    'kernel': (HP, WP, CHANNELS, WIDTH),
    'bias': (WIDTH,),
  }
  assert jax.tree.map(jnp.shape, dual) == {
    'ln0': {'scale': (d,), 'bias': (d,)},
    'dense': {'kernel': (d, WIDTH), 'bias': (WIDTH,)},
    'ln1': {'scale': (WIDTH,), 'bias': (WIDTH,)},
  }
  for kernel in (plain['kernel'], dual['dense']['kernel']):
    assert kernel.std() * np.sqrt(d) == pytest.approx(1, rel=0.05)
  for name in ('ln0', 'ln1'):
    assert (dual[name]['scale'] == 1).all() and not dual[name]['bias'].any()
  assert not plain['bias'].any() and not dual['dense']['bias'].any()


def test_order_of_pixels_in_a_patch():
  image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
  patches = cut_patches(jnp.asarray(image), (HP, WP))
  np.testing.assert_array_equal(patches, _cut(image))
  np.testing.assert_array_equal(patches[0, 0, 0, :4], image[0, 0, :2].flat[:4])


@pytest.mark.parametrize('patch_norm', ['none', 'dual'])
def test_bfloat16_sums_are_float32(patch_norm):
  """A bfloat16 running sum of ones would stop at 256."""
  model = PatchEmbed(2, (32, 32), patch_norm, dtype_mm='bfloat16')
  image = jnp.ones((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  ones = jax.tree.map(lambda a: jnp.ones(a.shape), shapes)

  def run(params, image):
    y, state = model.apply(params, image, capture_intermediates=True)
    return y if patch_norm == 'none' else state['intermediates']['dense']

  (y,) = jax.tree.leaves(jax.jit(run)(ones, image))
  assert y.dtype == jnp.bfloat16
  # 3072 ones and the bias, 3073, is 3072 in bfloat16's 8 bits.
  assert (y == 3072).all()


@pytest.mark.parametrize('patch_norm', ['none', 'dual'])
def test_dtypes(patch_norm):
  image = jnp.zeros(SHAPE, jnp.bfloat16)
  for dtype in ('float32', 'bfloat16'):
    model = _embed(patch_norm, dtype)
    y, variables = jax.eval_shape(
      model.init_with_output, jax.random.key(0), image
    )
    assert y.dtype == dtype
    assert {a.dtype.name for a in jax.tree.leaves(variables)} == {'float32'}


def test_mistakes():
  rng, image = jax.random.key(0), jnp.zeros(SHAPE)
  with pytest.raises(ConfigError, match=r'4×6 do not divide .* 13×12'):
    _embed('dual').init(rng, jnp.zeros((1, 13, 12, 3)))
  with pytest.raises(ConfigError, match=r'4×6 do not divide .* 12×13'):
    _embed('none').init(rng, jnp.zeros((1, 12, 13, 3)))
  with pytest.raises(ConfigError, match=r"unknown patch_norm 'dul'.*'dual'"):
    _embed('dul').init(rng, image)
  with pytest.raises(ConfigError, match=r"patch_norm_type 'rms'.*'rmsnorm'"):
    _embed('dual', patch_norm_type='rms').init(rng, image)
  with pytest.raises(ConfigError, match='float images, not uint8'):
    _embed('dual').init(rng, image.astype(jnp.uint8))
