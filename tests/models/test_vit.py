"""The ViT against a second one in numpy, and all that must not drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from big_vision_dpn.config import ConfigError
from big_vision_dpn.models import vit

TINY = {'width': 24, 'depth': 2, 'mlp_dim': 40, 'num_heads': 3}
TINY_VIT = {**TINY, 'patch_size': (4, 6)}
IMAGE = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype('f')


def _shapes(model, image_shape=IMAGE.shape):
  image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)['params']


def _random_params(model, image_shape=IMAGE.shape):
  """Parameters far from their initial zeros and ones."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda a: rng.normal(0.1, 0.4, a.shape).astype(np.float32),
    _shapes(model, image_shape),
  )


def _names(tree):
  return traverse_util.flatten_dict(tree, sep='/')


# A second implementation: numpy, float64, parameters by name.


def _np_norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def _np_patch_norm(p, name, x, kind):
  """Name's norm, as patch_norm_type says."""
  p = p.get(name, {})
  if kind == 'only_learnable':
    return p['scale'] * x + p['bias']
  if kind == 'rmsnorm':
    return p['scale'] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  unit = {'scale': 1, 'bias': 0}
  return _np_norm(unit if kind == 'no_learnable' else p, x)


def _np_dense(p, x):
  return np.tensordot(x, p['kernel'], 1) + p['bias']


def _np_mlp(p, x):
  x = _np_dense(p['Dense_0'], x)
  x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  if 'LayerNorm_0' in p:
    x = _np_norm(p['LayerNorm_0'], x)
  return _np_dense(p['Dense_1'], x)


def _np_attention(p, queries, x):
  q = _np_dense(p['query'], queries)  # n, l, heads, d
  k, v = _np_dense(p['key'], x), _np_dense(p['value'], x)
  weights = np.exp(np.einsum('nqhd,nkhd->nhqk', q, k) / np.sqrt(q.shape[-1]))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('nhqk,nkhd->nqhd', weights, v)
  if 'HeadScale_0' in p:
    y = y * p['HeadScale_0']['scale']
  if 'LayerNorm_0' in p:
    flat = {name: a.ravel() for name, a in p['LayerNorm_0'].items()}
    y = _np_norm(flat, y.reshape(*y.shape[:2], -1)).reshape(y.shape)
  return np.einsum('nqhd,hde->nqe', y, p['out']['kernel']) + p['out']['bias']


def _np_stem(p, image, cfg):
  (hp, wp), norm = cfg['patch_size'], cfg.get('patch_norm', 'none')
  kind = cfg.get('patch_norm_type', 'layernorm')
  n, h, w, c = image.shape
  x = image.reshape(n, h // hp, hp, w // wp, wp, c).swapaxes(2, 3)
  x = x.reshape(n, h // hp, w // wp, hp * wp * c)
  if norm == 'none':
    return x @ p['kernel'].reshape(hp * wp * c, -1) + p['bias']
  if norm in ('dual', 'pre', 'pre_post_posemb'):
    x = _np_patch_norm(p, 'ln0', x, kind)
  x = _np_dense(p['dense'], x)
  if norm in ('dual', 'post'):
    x = _np_patch_norm(p, 'ln1', x, kind)
  return x


def _np_block(p, x, cfg):
  at = cfg.get('post_norm_at', 'output')

  def attend(y):
    return _np_attention(p['MultiHeadDotProductAttention_0'], y, y)

  def mlp(y):
    return _np_mlp(p['MlpBlock_0'], y)

  for i, f in enumerate((attend, mlp)):
    pre, post = p.get(f'LayerNorm_{i}'), p.get(f'PostNorm_{i}')
    y = f(_np_norm(pre, x) if pre else x)
    if post and at == 'output':
      y = _np_norm(post, y)
    x = x + y
    if post and at == 'residual':
      x = _np_norm(post, x)
  return x


def _np_sincos(h, w, width):
  table = np.zeros((h, w, width))
  quarter = width // 4
  for y, x, i in np.ndindex(h, w, quarter):
    omega = 10_000 ** (-i / (quarter - 1))
    table[y, x, i::quarter] = [
      np.sin(x * omega),
      np.cos(x * omega),
      np.sin(y * omega),
      np.cos(y * omega),
    ]
  return table.reshape(1, h * w, width)


def _np_pool(p, x, pool_type='gap'):
  if pool_type == 'gap':
    return x.mean(1)
  if pool_type == 'none':
    return x
  if pool_type == 'map':
    p = p['MAPHead_0']
    probe = np.repeat(p['probe'], len(x), 0)
    x = _np_attention(p['MultiHeadDotProductAttention_0'], probe, x)
    x = x + _np_mlp(p['MlpBlock_0'], _np_norm(p['LayerNorm_0'], x))
  return x[:, 0]


def _np_vit(params, image, cfg):
  """Logits, and the logits of every patch."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = _np_stem(p['embedding'], image.astype(np.float64), cfg)
  n, h, w, d = x.shape
  learned = cfg.get('posemb', 'learn') == 'learn'
  posemb = p['pos_embedding'] if learned else _np_sincos(h, w, d)
  x = x.reshape(n, h * w, d) + posemb
  if 'posemb' in cfg.get('patch_norm', 'none'):
    kind = cfg.get('patch_norm_type', 'layernorm')
    x = _np_patch_norm(p, 'posemb_norm', x, kind)
  if 'cls' in p:
    x = np.concatenate([np.repeat(p['cls'], n, 0), x], 1)
  for layer in range(cfg['depth']):
    x = _np_block(p['Transformer'][f'encoderblock_{layer}'], x, cfg)
  x = _np_norm(p['Transformer']['encoder_norm'], x)

  pooled, tokens = _np_pool(p, x, cfg.get('pool_type', 'gap')), x[:, -h * w :]
  if 'pre_logits' in p:
    pooled = np.tanh(_np_dense(p['pre_logits'], pooled))
    tokens = np.tanh(_np_dense(p['pre_logits'], tokens))
  logits_2d = _np_dense(p['head'], tokens).reshape(n, h, w, -1)
  return _np_dense(p['head'], pooled), logits_2d


PLACES = ('pre', 'post', 'pre_post')
CASES = [
  {'pool_type': 'gap', 'patch_norm': 'dual'},
  {'pool_type': 'tok', 'patch_norm': 'dual', 'rep_size': True},
  {'pool_type': 'tok', 'patch_norm': 'none', 'posemb': 'sincos2d'},
  {'pool_type': 'map', 'patch_norm': 'none', 'rep_size': 20},
  {'pool_type': 'map', 'patch_norm': 'dual', 'posemb': 'sincos2d'},
  {'pool_type': '0', 'patch_norm': 'none'},
  {'pool_type': 'none', 'patch_norm': 'dual'},
  {'patch_norm': 'pre', 'pool_type': 'tok'},
  {'patch_norm': 'post'},
  {'patch_norm': 'post_posemb', 'pool_type': 'tok'},
  {'patch_norm': 'pre_post_posemb', 'posemb': 'sincos2d'},
  {'patch_norm': 'dual', 'patch_norm_type': 'rmsnorm'},
  {'patch_norm': 'dual', 'patch_norm_type': 'only_learnable'},
  {'patch_norm': 'dual', 'patch_norm_type': 'no_learnable'},
  {'patch_norm': 'pre_post_posemb', 'patch_norm_type': 'rmsnorm'},
  {'patch_norm': 'post_posemb', 'patch_norm_type': 'no_learnable'},
  *({'sa_norm': a, 'mlp_norm': b} for a in PLACES for b in PLACES),
  {'sa_norm': 'post', 'mlp_norm': 'pre_post', 'post_norm_at': 'residual'},
  {'sa_norm': 'pre_post', 'mlp_norm': 'post', 'post_norm_at': 'residual'},
  {'sublayer_norm': 'normformer', 'patch_norm': 'dual'},
  {'sublayer_norm': 'subln', 'pool_type': 'map'},
]


def _forward_error(options, dtype_mm):
  cfg = {**TINY_VIT, **options, 'dtype_mm': dtype_mm}
  model = vit.Model(10, **cfg)
  params = _random_params(model)
  logits, out = jax.jit(model.apply)({'params': params}, IMAGE)
  assert logits.dtype == jnp.float32
  expected, expected_2d = _np_vit(params, IMAGE, cfg)
  np.testing.assert_array_equal(logits, out['logits'])
  return max(
    np.abs(logits - expected).max() / expected.std(),
    np.abs(out['logits_2d'] - expected_2d).max() / expected_2d.std(),
  )


@pytest.mark.parametrize(
  'options', CASES, ids=lambda c: '-'.join(map(str, c.values()))
)
def test_forward_pass_is_the_formula(options):
  assert _forward_error(options, 'float32') < 3e-5


@pytest.mark.parametrize('options', [CASES[1], CASES[3]], ids=['tok', 'map'])
def test_forward_pass_in_bfloat16(options):
  assert 1e-4 < _forward_error(options, 'bfloat16') < 0.15


# Parameters at 224 px with 1000 classes, rep_size=True and pool_type 'tok':
# with patch_norm 'none', and with 'dual'.
PARAMETERS = {
  'mu/16': (77_736, 79_336),
  'Ti/16': (5_754_280, 5_756_200),
  'S/32': (23_026_408, 23_033_320),
  'S/16': (22_198_120, 22_200_424),
  'M/16': (39_099_880, 39_102_440),
  'B/32': (88_814_056, 88_821_736),
  'B/16': (87_157_480, 87_160_552),
  'L/16': (305_375_208, 305_378_792),
  'So400m/16': (415_063_000, 415_066_840),
  'H/16': (633_837_800, 633_841_896),
  'g/16': (1_014_762_856, 1_014_767_208),
  'g-opt/16': (1_138_645_480, 1_138_650_088),
  'G/16': (1_847_409_256, 1_847_414_120),
  'G-opt/16': (1_667_385_832, 1_667_390_440),
  'e/16': (3_810_640_616, 3_810_645_736),
}


def _size(tree):
  return sum(np.prod(a.shape, dtype=int) for a in jax.tree.leaves(tree))


def _imagenet_shapes(variant, **kw):
  kw = {'variant': variant, 'rep_size': True, 'pool_type': 'tok', **kw}
  return _shapes(vit.Model(1000, **kw), (1, 224, 224, 3))


@pytest.mark.parametrize('patch_norm', ['none', 'dual'])
@pytest.mark.parametrize('variant', PARAMETERS)
def test_parameter_count(variant, patch_norm):
  """Of a single block, times the depth: tracing all 56 takes too long."""
  shapes = _imagenet_shapes(variant, patch_norm=patch_norm, depth=1)
  block = _size(shapes['Transformer']['encoderblock_0'])
  count = _size(shapes) + (vit.Model(variant=variant).depth - 1) * block
  assert count == PARAMETERS[variant][patch_norm == 'dual']


@pytest.mark.parametrize('variant', ['Ti/16', 'S/32', 'L/16'])
def test_parameter_count_at_full_depth(variant):
  assert _size(_imagenet_shapes(variant)) == PARAMETERS[variant][0]


@pytest.mark.parametrize('variant', PARAMETERS)
def test_table_of_parameters_is_arithmetic(variant):
  d, depth, mlp, _ = vit.VARIANTS[variant.split('/')[0]]
  p = int(variant.split('/')[1])
  patch = 3 * p**2
  block = 4 * (d * d + d) + (d * mlp + mlp) + (mlp * d + d) + 2 * 2 * d
  outside = (
    (patch * d + d)  # embedding
    + (224 // p) ** 2 * d  # pos_embedding
    + d  # cls
    + 2 * d  # encoder_norm
    + (d * d + d)  # pre_logits
    + (1000 * d + 1000)  # head
  )
  plain, dual = PARAMETERS[variant]
  assert plain == outside + depth * block
  assert dual - plain == 2 * patch + 2 * d


def test_every_variant_is_counted():
  assert {name.split('/')[0] for name in PARAMETERS} == set(vit.VARIANTS)


def _layer(path, *params):
  return {f'{path}/{param}' for param in params}


def _dense(path):
  return _layer(path, 'kernel', 'bias')


def _norm(path):
  return _layer(path, 'scale', 'bias')


def _attention(path):
  path += '/MultiHeadDotProductAttention_0'
  return set().union(
    *(_dense(f'{path}/{name}') for name in ('query', 'key', 'value', 'out'))
  )


def _mlp(path):
  return _dense(f'{path}/MlpBlock_0/Dense_0') | _dense(
    f'{path}/MlpBlock_0/Dense_1'
  )


def _block(path):
  return (
    _norm(f'{path}/LayerNorm_0')
    | _attention(path)
    | _norm(f'{path}/LayerNorm_1')
    | _mlp(path)
  )


BODY = (
  _block('Transformer/encoderblock_0')
  | _block('Transformer/encoderblock_1')
  | _norm('Transformer/encoder_norm')
)
PLAIN_STEM = _dense('embedding')
DUAL_STEM = (
  _norm('embedding/ln0') | _dense('embedding/dense') | _norm('embedding/ln1')
)


def test_parameter_names_are_big_visions():
  names = _names(_shapes(vit.Model(10, **TINY_VIT, pool_type='tok')))
  expected = PLAIN_STEM | BODY | _dense('head') | {'cls', 'pos_embedding'}
  assert names.keys() == expected
  assert names['embedding/kernel'].shape == (4, 6, 3, 24)
  assert names['pos_embedding'].shape == (1, 6, 24)
  assert names['cls'].shape == (1, 1, 24)
  attention = 'Transformer/encoderblock_1/MultiHeadDotProductAttention_0'
  assert names[f'{attention}/query/kernel'].shape == (24, 3, 8)
  assert names[f'{attention}/out/kernel'].shape == (3, 8, 24)


def test_parameter_names_with_dual_patchnorm_and_map_head():
  cfg = {'pool_type': 'map', 'rep_size': True, 'patch_norm': 'dual'}
  names = _names(_shapes(vit.Model(None, **TINY_VIT, **cfg, posemb='sincos2d')))
  head = _attention('MAPHead_0') | _norm('MAPHead_0/LayerNorm_0')
  head |= _mlp('MAPHead_0') | {'MAPHead_0/probe'} | _dense('pre_logits')
  assert names.keys() == DUAL_STEM | BODY | head
  assert names['MAPHead_0/probe'].shape == (1, 1, 24)


def _both(layer, path, blocks=(0, 1)):
  block = 'Transformer/encoderblock_{}/' + path
  return set().union(*(layer(block.format(i)) for i in blocks))


PRE = [_both(_norm, f'LayerNorm_{i}') for i in (0, 1)]
POST = [_both(_norm, f'PostNorm_{i}') for i in (0, 1)]
INNER = [
  _both(_norm, f'{path}/LayerNorm_0')
  for path in ('MultiHeadDotProductAttention_0', 'MlpBlock_0')
]
HEADS = _both(
  lambda path: _layer(path, 'scale'),
  'MultiHeadDotProductAttention_0/HeadScale_0',
)
DENSE = _dense('embedding/dense')
LN0, LN1 = _norm('embedding/ln0'), _norm('embedding/ln1')
NORMS = _norm('posemb_norm')
SCALES = {'embedding/ln0/scale', 'embedding/ln1/scale'}
W, PATCH, MLP = 24, 4 * 6 * 3, 40


@pytest.mark.parametrize(
  'options, without, within, more',
  [
    # Options; the parameters that the plain ViT has and it has not, and the
    # other way round; how many numbers it has more.
    ({'patch_norm': 'dual'}, PLAIN_STEM, DUAL_STEM, 2 * PATCH + 2 * W),
    ({'patch_norm': 'pre'}, PLAIN_STEM, DENSE | LN0, 2 * PATCH),
    ({'patch_norm': 'post'}, PLAIN_STEM, DENSE | LN1, 2 * W),
    ({'patch_norm': 'post_posemb'}, PLAIN_STEM, DENSE | NORMS, 2 * W),
    (
      {'patch_norm': 'pre_post_posemb'},
      PLAIN_STEM,
      DENSE | LN0 | NORMS,
      2 * PATCH + 2 * W,
    ),
    (
      {'patch_norm': 'dual', 'patch_norm_type': 'rmsnorm'},
      PLAIN_STEM,
      DENSE | SCALES,
      PATCH + W,
    ),
    (
      {'patch_norm': 'dual', 'patch_norm_type': 'only_learnable'},
      PLAIN_STEM,
      DUAL_STEM,
      2 * PATCH + 2 * W,
    ),
    (
      {'patch_norm': 'dual', 'patch_norm_type': 'no_learnable'},
      PLAIN_STEM,
      DENSE,
      0,
    ),
    ({'sa_norm': 'post'}, PRE[0], POST[0], 0),
    ({'mlp_norm': 'post'}, PRE[1], POST[1], 0),
    ({'sa_norm': 'pre_post'}, set(), POST[0], 2 * 2 * W),
    (
      {'sa_norm': 'pre_post', 'mlp_norm': 'pre_post'},
      set(),
      POST[0] | POST[1],
      2 * 4 * W,
    ),
    (
      {'sublayer_norm': 'normformer'},
      set(),
      POST[0] | HEADS | INNER[1],
      2 * (2 * W + 3 + 2 * MLP),
    ),
    (
      {'sublayer_norm': 'subln'},
      set(),
      INNER[0] | INNER[1],
      2 * (2 * W + 2 * MLP),
    ),
    (
      {'stochastic_depth': 0.1, 'remat_policy': 'dots_saveable'},
      set(),
      set(),
      0,
    ),
  ],
  ids=lambda v: '-'.join(map(str, v.values())) if isinstance(v, dict) else '',
)
def test_parameters_of_an_option(options, without, within, more):
  plain = _shapes(vit.Model(10, **TINY_VIT))
  shapes = _shapes(vit.Model(10, **TINY_VIT, **options))
  assert _names(plain).keys() - _names(shapes).keys() == without
  assert _names(shapes).keys() - _names(plain).keys() == within
  assert _size(shapes) - _size(plain) == more


@pytest.mark.parametrize(
  'pool_type, pooled, tokens',
  [
    ('gap', (2, 24), 6),
    ('map', (2, 24), 6),
    ('tok', (2, 24), 7),
    ('0', (2, 24), 6),
    ('none', (2, 6, 24), 6),
  ],
)
def test_what_the_call_gives(pool_type, pooled, tokens):
  model = vit.Model(10, **TINY_VIT, pool_type=pool_type, rep_size=16)
  (logits, out), _ = jax.eval_shape(
    model.init_with_output, jax.random.key(0), IMAGE
  )
  blocks = {
    f'encoder/block{layer:02d}/{key}': (2, tokens, 24)
    for layer in range(2)
    for key in ('sa', '+sa', 'mlp', '+mlp')
  }
  assert logits.shape == (*pooled[:-1], 10)
  assert {name: a.shape for name, a in _names(out).items()} == {
    'stem': (2, 3, 2, 24),
    'with_posemb': (2, 6, 24),
    **blocks,
    'encoder/pre_ln': (2, tokens, 24),
    'encoded': (2, tokens, 24),
    'head_input': pooled,
    'pre_logits': (*pooled[:-1], 16),
    'pre_logits_2d': (2, 3, 2, 16),
    'logits': logits.shape,
    'logits_2d': (2, 3, 2, 10),
  }


def test_without_a_head_the_call_gives_pre_logits():
  for dtype in ('float32', 'bfloat16'):
    model = vit.Model(**TINY_VIT, pool_type='map', dtype_mm=dtype)
    (x, out), variables = jax.eval_shape(
      model.init_with_output, jax.random.key(0), IMAGE
    )
    assert (x.shape, x.dtype) == ((2, 24), jnp.float32)
    assert not {'logits', 'logits_2d'} & out.keys()
    assert out['with_posemb'].dtype == out['encoder']['pre_ln'].dtype == dtype
    assert {a.dtype.name for a in jax.tree.leaves(variables)} == {'float32'}


# The default random bits take the CPU's compiler many times as long.
RNG = {'impl': 'rbg'}


def test_initial_values():
  cfg = {**TINY, 'width': 96, 'depth': 1, 'patch_size': 4, 'pool_type': 'tok'}

  def init(names, **kw):
    def draw():
      params = vit.Model(10, **cfg, **kw).init(jax.random.key(0, **RNG), IMAGE)
      return [_names(params['params'])[name] for name in names]

    return jax.jit(draw)()

  block = 'Transformer/encoderblock_0'
  cls, head, posemb, mlp, bias, query = init(
    (
      'cls',
      'head/kernel',
      'pos_embedding',
      f'{block}/MlpBlock_0/Dense_0/kernel',
      f'{block}/MlpBlock_0/Dense_1/bias',
      f'{block}/MultiHeadDotProductAttention_0/query/kernel',
    )
  )
  assert not cls.any() and not head.any()
  assert posemb.std() == pytest.approx(96**-0.5, rel=0.1)
  assert 0.98 < np.abs(mlp).max() / np.sqrt(6 / (96 + 40)) <= 1
  assert 0.98 < np.abs(query).max() / np.sqrt(6 / (96 + 96)) <= 1
  assert 0 < np.abs(bias).max() < 1e-5

  (head,) = init(['head/kernel'], head_zeroinit=False)
  assert head.std() == pytest.approx(96**-0.5, rel=0.1)


def test_dropout():
  cfg = {**TINY_VIT, 'depth': 1}
  model = vit.Model(10, **cfg, dropout=0.5)
  params = {'params': _random_params(model)}

  @jax.jit
  def train(rng):
    return model.apply(params, IMAGE, train=True, rngs={'dropout': rng})

  keys = [jax.random.key(seed, **RNG) for seed in (0, 1, 0)]
  (a, out), (b, _), (again, _) = map(train, keys)
  assert (a == again).all() and not (a == b).any()
  # `mlp` is reported as it was before half of it was dropped.
  block = out['encoder']['block00']
  assert 0.3 < (block['+mlp'] == block['+sa']).mean() < 0.7
  assert block['mlp'].all()
  # Where the attention was dropped and the embedding too, nothing is left.
  assert 0.15 < (block['+sa'] == 0).mean() < 0.35

  without = vit.Model(10, **cfg)
  plain = jax.jit(lambda p: model.apply(p, IMAGE)[0])(params)
  same = jax.jit(lambda p: without.apply(p, IMAGE, train=True)[0])(params)
  assert not (plain == a).any()
  np.testing.assert_array_equal(plain, same)


def test_model_takes_variants_and_overrides():
  assert vit.decode_variant(None) == {}
  assert vit.decode_variant('mu') == {
    'width': 32,
    'depth': 1,
    'mlp_dim': 128,
    'num_heads': 2,
  }
  model = vit.Model(7, variant='B/32', depth=3, patch_size=[16, 8], name='img')
  sizes = (model.num_classes, model.width, model.depth, model.num_heads)
  assert sizes == (7, 768, 3, 12)
  assert model.patch_size == (16, 8)
  assert model.name == 'img'
  assert vit.Model(variant='mu/4').patch_size == (4, 4)
  assert vit.Model(variant='mu', patch_size=8).patch_size == (8, 8)
  assert vit.Model() == vit.ViT()


@pytest.mark.parametrize(
  'kw, message',
  [
    ({'variant': 'Bt/16'}, r"unknown variant 'Bt'.*Choices: B, G, G-opt"),
    ({'variant': 'B/16x8'}, r"'B/16x8': .*'B/16'.*patch_size=\(16, 8\)"),
    ({'variant': 'B/'}, r"'B/': .*'B/16'"),
    ({'variant': 'B/0'}, r'two positive numbers of pixels'),
    ({'patch_size': (16, 16, 3)}, r'patch_size .* not \(16, 16, 3\)'),
    ({'patch_size': (16.0, 16.0)}, r'patch_size .* not \(16.0, 16.0\)'),
    ({'pool_typ': 'gap'}, r"'pool_typ'.*mean 'pool_type'.*Choices: depth"),
    ({'parent': None}, r"'parent'"),
    ({'pool_type': 'mapp'}, r"unknown pool_type 'mapp'.*mean 'map'"),
    ({'posemb': 'sincos'}, r"unknown posemb 'sincos'.*learn, sincos2d"),
    ({'patch_norm': 'dula'}, r"unknown patch_norm 'dula'.*mean 'dual'"),
    ({'patch_norm': 'posemb'}, r"mean 'post_posemb'"),
    ({'patch_norm_type': 'rms'}, r"unknown patch_norm_type 'rms'"),
    ({'sa_norm': 'prepost'}, r"unknown sa_norm .*mean 'pre_post'"),
    ({'remat_policy': 'dots'}, r"unknown remat_policy 'dots'"),
    ({'sublayer_norm': 'subln', 'mlp_norm': 'post'}, r"'subln' has its own"),
    ({'stochastic_depth': 1.0}, r'stochastic_depth is a probability below 1'),
    ({'dropout': -0.1}, r'dropout is a probability below 1, not -0.1'),
    ({'dtype_mm': 'bf16'}, r"unknown dtype_mm 'bf16'.*bfloat16, float32"),
    ({'width': 100, 'num_heads': 3}, r'width 100 .* num_heads 3'),
    ({'posemb': 'sincos2d', 'width': 6, 'num_heads': 1}, r'multiple of 4'),
    ({'posemb': 'sincos2d', 'width': 4, 'num_heads': 1}, r'at least 8'),
  ],
)
def test_mistakes_are_found_before_tracing(kw, message):
  with pytest.raises(ConfigError, match=message):
    vit.Model(10, **kw)


def test_images_of_bytes_are_refused():
  with pytest.raises(ConfigError, match='float images, not uint8'):
    vit.Model(10, **TINY_VIT).init(jax.random.key(0), np.uint8(IMAGE))
