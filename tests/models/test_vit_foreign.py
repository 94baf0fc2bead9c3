"""HuggingFace's and timm's ViTs, against their forward pass in NumPy.

The references read the arrays as torch's modules do, in float64: Linear is
x Wᵀ + b, a convolution's weight is (out, in, h, w), and timm's qkv holds the
three matrices one below the other, the heads inside of each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
from flax import traverse_util

from big_vision_dpn.config import ConfigError
from big_vision_dpn.models import vit

WIDTH, DEPTH, MLP, HEADS, PATCH, CLASSES = 12, 2, 20, 3, 4, 5
CFG = dict(
  width=WIDTH, depth=DEPTH, mlp_dim=MLP, num_heads=HEADS, patch_size=PATCH
)


def _random(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: (0.3 * rng.normal(size=s) + name.endswith('norm.weight')).astype('f')
    for name, s in shapes.items()
  }


def _linear(name, outs, ins=WIDTH):
  return {f'{name}.weight': (outs, ins), f'{name}.bias': (outs,)}


def _norm(name):
  return {f'{name}.weight': (WIDTH,), f'{name}.bias': (WIDTH,)}


def _huggingface(rows=10):
  shapes = {
    'embeddings.cls_token': (1, 1, WIDTH),
    'embeddings.position_embeddings': (1, rows, WIDTH),
    'embeddings.patch_embeddings.projection.weight': (WIDTH, 3, PATCH, PATCH),
    'embeddings.patch_embeddings.projection.bias': (WIDTH,),
    **_norm('layernorm'),
  }
  for i in range(DEPTH):
    block = f'encoder.layer.{i}.'
    for part in ('query', 'key', 'value'):
      shapes |= _linear(f'{block}attention.attention.{part}', WIDTH)
    shapes |= _linear(f'{block}attention.output.dense', WIDTH)
    shapes |= _linear(f'{block}intermediate.dense', MLP)
    shapes |= _linear(f'{block}output.dense', WIDTH, MLP)
    shapes |= _norm(f'{block}layernorm_before')
    shapes |= _norm(f'{block}layernorm_after')
  return _random(shapes)


def _timm(prefix_rows=1):
  shapes = {
    'pos_embed': (1, 9 + prefix_rows, WIDTH),
    'patch_embed.proj.weight': (WIDTH, 3, PATCH, PATCH),
    'patch_embed.proj.bias': (WIDTH,),
    **_norm('norm'),
    **_linear('head', CLASSES),
  }
  for i in range(DEPTH):
    block = f'blocks.{i}.'
    shapes |= _norm(f'{block}norm1') | _norm(f'{block}norm2')
    shapes |= _linear(f'{block}attn.qkv', 3 * WIDTH)
    shapes |= _linear(f'{block}attn.proj', WIDTH)
    shapes |= _linear(f'{block}mlp.fc1', MLP)
    shapes |= _linear(f'{block}mlp.fc2', WIDTH, MLP)
  return _random(shapes)


class _Reference:
  """What torch computes."""

  def __init__(self, arrays, eps, exact_gelu):
    self.arrays = {k: a.astype(np.float64) for k, a in arrays.items()}
    self.eps, self.exact_gelu = eps, exact_gelu

  def linear(self, name, x):
    return x @ self.arrays[f'{name}.weight'].T + self.arrays[f'{name}.bias']

  def norm(self, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps)
    return x * self.arrays[f'{name}.weight'] + self.arrays[f'{name}.bias']

  def gelu(self, x):
    if self.exact_gelu:
      return x * scipy.special.ndtr(x)
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def attention(self, q, k, v):
    split = lambda x: x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    out = scipy.special.softmax(scores, axis=-1) @ v
    return out.transpose(1, 0, 2).reshape(out.shape[1], -1)

  def embed(self, name, image):
    weight = self.arrays[f'{name}.weight']
    n = image.shape[0] // PATCH
    rows = []
    for i in range(n):
      for j in range(n):
        patch = image[i * PATCH :, j * PATCH :][:PATCH, :PATCH]
        rows.append(np.einsum('hwc,dchw->d', patch, weight))
    return np.array(rows) + self.arrays[f'{name}.bias']

  def huggingface(self, image):
    """The sequence, normalised."""
    x = self.embed('embeddings.patch_embeddings.projection', image)
    x = np.concatenate([self.arrays['embeddings.cls_token'][0], x])
    x = x + self.arrays['embeddings.position_embeddings'][0]
    for i in range(DEPTH):
      block = f'encoder.layer.{i}.'
      y = self.norm(f'{block}layernorm_before', x)
      parts = ('query', 'key', 'value')
      y = self.attention(
        *(self.linear(f'{block}attention.attention.{p}', y) for p in parts)
      )
      x = x + self.linear(f'{block}attention.output.dense', y)
      y = self.norm(f'{block}layernorm_after', x)
      y = self.gelu(self.linear(f'{block}intermediate.dense', y))
      x = x + self.linear(f'{block}output.dense', y)
    return self.norm('layernorm', x)

  def timm(self, image, cls):
    x = self.embed('patch_embed.proj', image)
    if cls:
      x = np.concatenate([self.arrays['cls_token'][0], x])
    x = x + self.arrays['pos_embed'][0]
    for i in range(DEPTH):
      block = f'blocks.{i}.'
      y = self.linear(f'{block}attn.qkv', self.norm(f'{block}norm1', x))
      y = self.attention(*np.split(y, 3, axis=-1))
      x = x + self.linear(f'{block}attn.proj', y)
      y = self.linear(f'{block}mlp.fc1', self.norm(f'{block}norm2', x))
      x = x + self.linear(f'{block}mlp.fc2', self.gelu(y))
    return self.norm('norm', x)

  def pool(self, x):
    q = self.linear('attn_pool.q', self.arrays['attn_pool.latent'][0])
    y = self.attention(q, *np.split(self.linear('attn_pool.kv', x), 2, axis=-1))
    x = self.linear('attn_pool.proj', y)
    y = self.linear('attn_pool.mlp.fc1', self.norm('attn_pool.norm', x))
    return (x + self.linear('attn_pool.mlp.fc2', self.gelu(y)))[0]


def _apply(tmp_path, arrays, size=12, num_classes=CLASSES, dont_load=(), **kw):
  """What our model makes of a random image with the arrays; the image."""
  path = str(tmp_path / 'model.safetensors')
  safetensors.numpy.save_file(arrays, path)
  kw = {**CFG, **kw}
  model = vit.Model(num_classes, **kw)
  image = np.random.default_rng(7).uniform(-1, 1, (size, size, 3))
  batch = jnp.asarray(image[None], jnp.float32)
  init = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  params = vit.load(init, path, kw, dont_load=dont_load)
  logits, out = jax.jit(model.apply)({'params': params}, batch)
  return np.asarray(logits)[0], jax.tree.map(np.asarray, out), image


@pytest.mark.parametrize('prefix', ['', 'vit.'])
def test_huggingface(tmp_path, prefix):
  arrays = _huggingface()
  head = _random(_linear('classifier', CLASSES), seed=1)
  named = {prefix + name: a for name, a in arrays.items()} | head
  logits, out, image = _apply(tmp_path, named, pool_type='tok')
  same = _Reference(arrays | head, eps=1e-6, exact_gelu=False)
  encoded = same.huggingface(image)
  np.testing.assert_allclose(out['encoded'][0], encoded, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    logits, same.linear('classifier', encoded[0]), rtol=1e-4, atol=1e-5
  )
  # What theirs makes otherwise, with its own ε and gelu, is little.
  theirs = _Reference(arrays, eps=1e-12, exact_gelu=True).huggingface(image)
  assert np.abs(theirs - encoded).max() < 5e-3


def test_huggingface_pooler(tmp_path):
  arrays = _huggingface() | _random(_linear('pooler.dense', WIDTH), seed=1)
  pooled, _, image = _apply(
    tmp_path, arrays, num_classes=0, pool_type='tok', rep_size=True
  )
  reference = _Reference(arrays, eps=1e-6, exact_gelu=False)
  expected = reference.linear('pooler.dense', reference.huggingface(image)[0])
  np.testing.assert_allclose(pooled, np.tanh(expected), rtol=1e-4, atol=1e-5)


def test_timm(tmp_path):
  arrays = _timm() | _random({'cls_token': (1, 1, WIDTH)}, seed=1)
  logits, _, image = _apply(tmp_path, arrays, pool_type='tok')
  reference = _Reference(arrays, eps=1e-6, exact_gelu=False)
  expected = reference.linear('head', reference.timm(image, cls=True)[0])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_timm_with_attention_pooling(tmp_path):
  pool = _random(
    {
      'attn_pool.latent': (1, 1, WIDTH),
      **_linear('attn_pool.q', WIDTH),
      **_linear('attn_pool.kv', 2 * WIDTH),
      **_linear('attn_pool.proj', WIDTH),
      **_linear('attn_pool.mlp.fc1', MLP),
      **_linear('attn_pool.mlp.fc2', WIDTH, MLP),
      **_norm('attn_pool.norm'),
    },
    seed=1,
  )
  arrays = _timm(prefix_rows=0) | pool
  logits, _, image = _apply(tmp_path, arrays, pool_type='map')
  reference = _Reference(arrays, eps=1e-6, exact_gelu=False)
  pooled = reference.pool(reference.timm(image, cls=False))
  np.testing.assert_allclose(
    logits, reference.linear('head', pooled), rtol=1e-4, atol=1e-5
  )


def test_dpn_takes_the_kernel(tmp_path):
  """The stem's own LayerNorms are fresh."""
  arrays = _timm(prefix_rows=0)
  path = str(tmp_path / 'model.safetensors')
  safetensors.numpy.save_file(arrays, path)
  kw = {**CFG, 'patch_norm': 'dual'}
  model = vit.Model(CLASSES, **kw)
  image = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
  init = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  params = vit.load(init, path, kw, dont_load=['embedding/ln.*'])
  kernel = params['embedding']['dense']['kernel']
  patch = np.random.default_rng(0).normal(size=(PATCH, PATCH, 3))
  weight = arrays['patch_embed.proj.weight']
  np.testing.assert_allclose(
    patch.reshape(-1) @ kernel,
    np.einsum('hwc,dchw->d', patch, weight),
    rtol=1e-5,
    atol=1e-5,
  )


def test_what_our_vit_lacks_does_not_fit(tmp_path):
  arrays = _timm(prefix_rows=0)
  arrays |= _random({'blocks.0.ls1.gamma': (WIDTH,), **_norm('fc_norm')})
  with pytest.raises(ConfigError) as error:
    _apply(tmp_path, arrays)
  lines = str(error.value).splitlines()
  missing = '(12,) in the file, missing in the model'
  assert lines[1:-1] == [
    f'  blocks.0.ls1.gamma: {missing}',
    f'  fc_norm.bias: {missing}',
    f'  fc_norm.weight: {missing}',
  ]
  assert r"'fc_norm\\.bias'" in lines[-1]
  regexes = [r'blocks\.0\.ls1\.gamma', r'fc_norm\..*']
  logits, *_ = _apply(tmp_path, arrays, dont_load=regexes)
  assert logits.shape == (CLASSES,)


def test_heads_that_do_not_divide_do_not_fit(tmp_path):
  with pytest.raises(
    ConfigError, match=r'query/kernel: \(12, 12\) in .*, \(20, 5, 4\) in the'
  ):
    _apply(tmp_path, _timm(0), width=20, num_heads=5)


def test_names_of_neither(tmp_path):
  arrays = _random({'visual.conv1.weight': (4, 3, 2, 2)})
  with pytest.raises(
    ConfigError, match=r"'visual\.conv1\.weight' are neither .* timm"
  ):
    _apply(tmp_path, arrays)


def test_every_parameter_is_used(tmp_path):
  """All of the model's come from the file, all of the file's go somewhere."""
  path = str(tmp_path / 'model.safetensors')
  safetensors.numpy.save_file(_huggingface(), path)
  kw = {**CFG, 'pool_type': 'tok'}
  model = vit.Model(0, **kw)
  image = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
  init = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  loaded = traverse_util.flatten_dict(vit.load(init, path, kw), sep='/')
  sizes = sum(a.size for a in loaded.values())
  assert sizes == sum(a.size for a in _huggingface().values()) - WIDTH
