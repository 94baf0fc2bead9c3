"""The encoder: a loop and a scan are one, and what stochastic depth leaves."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_dpn.models import common, vit
from big_vision_dpn.sharding import Layout, make_mesh

DEPTH = 3
X = np.random.default_rng(0).normal(size=(8, 5, 12)).astype('f')
VIT = {'width': 12, 'depth': DEPTH, 'mlp_dim': 20, 'num_heads': 2}
IMAGE = np.random.default_rng(1).uniform(-1, 1, (8, 8, 8, 3)).astype('f')


def _encoder(sublayer_norm='none', dropout=0.0, dtype_mm='float32', **kw):
  block = functools.partial(
    common.Encoder1DBlock,
    mlp_dim=20,
    num_heads=2,
    dropout=dropout,
    dtype_mm=dtype_mm,
    sublayer_norm=sublayer_norm,
  )
  return common.Encoder(depth=DEPTH, block=block, **kw)


def _init(encoder, x=X):
  return jax.jit(encoder.init)(jax.random.key(3), x)['params']


def _stack(params):
  blocks = [params[f'encoderblock_{i}'] for i in range(DEPTH)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
  return {
    'encoderblock': stacked,
    'encoder_norm': params['encoder_norm'],
  }


def _loss_and_grads(encoder, params, train=True):
  @jax.jit
  def run(params):
    y, out = encoder.apply(
      {'params': params}, X, not train, rngs={'dropout': jax.random.key(5)}
    )
    return (y * jnp.asarray(X)).sum(), (y, out)

  (_, y), grads = jax.value_and_grad(run, has_aux=True)(params)
  return y, grads


def _check_equal(a, b, **kw):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **kw)


def test_initial_values_of_loop_and_scan():
  loop, scan = _init(_encoder()), _init(_encoder(scan=True))
  _check_equal(_stack(loop), scan, rtol=0)
  kernels = scan['encoderblock']['MlpBlock_0']['Dense_0']['kernel']
  assert not (kernels[0] == kernels[1]).any()


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'dropout': 0.2, 'stochastic_depth': 0.5},
    {'sublayer_norm': 'normformer'},
    {'dtype_mm': 'bfloat16', 'dropout': 0.2},
  ],
  ids=str,
)
def test_scan_is_the_loop(options):
  """What comes out, what lies between, what is dropped, and the gradients."""
  loop, scan = _encoder(**options), _encoder(**options, scan=True)
  params = _init(loop)
  tolerance = {'rtol': 1e-5, 'atol': 2e-5}
  if options.get('dtype_mm'):
    tolerance = {'rtol': 0.05, 'atol': 0.05}
  y, grads = _loss_and_grads(loop, params)
  y_scan, grads_scan = _loss_and_grads(scan, _stack(params))
  _check_equal(y, y_scan, **tolerance)
  _check_equal(_stack(grads), grads_scan, **tolerance)


@pytest.mark.parametrize(
  ('policy', 'scan'),
  [
    ('nothing_saveable', False),
    ('nothing_saveable', True),
    ('dots_saveable', True),
    ('dots_with_no_batch_dims_saveable', False),
  ],
)
def test_remat_changes_nothing(policy, scan):
  options = {'scan': scan, 'dropout': 0.2, 'stochastic_depth': 0.3}
  params = _init(_encoder(**options))
  kept = _loss_and_grads(_encoder(**options), params)
  again = _loss_and_grads(_encoder(**options, remat_policy=policy), params)
  _check_equal(kept, again, rtol=1e-5, atol=2e-5)


def test_remat_keeps_less():
  """Bytes that the forward pass leaves for the backward pass."""

  def kept(policy, scan):
    encoder = _encoder(remat_policy=policy, scan=scan)
    params = _init(encoder)
    _, backward = jax.vjp(
      lambda p, x: encoder.apply({'params': p}, x)[0], params, X
    )
    return sum(a.nbytes for a in jax.tree.leaves(backward))

  for scan in (False, True):
    sizes = [
      kept(policy, scan)
      for policy in ('nothing_saveable', 'dots_saveable', 'none')
    ]
    assert sizes[0] < sizes[1] < sizes[2], sizes


def test_stochastic_depth_leaves_out_whole_sublayers():
  """Linearly more often with the depth; the others are divided by 1 - rate."""
  encoder = _encoder(stochastic_depth=0.6)
  params = _init(encoder)
  dropped = {(layer, f): 0 for layer in range(DEPTH) for f in ('sa', 'mlp')}

  @jax.jit
  def run(rng):
    rngs = {'dropout': rng}
    return encoder.apply({'params': params}, X, False, rngs=rngs)[1]

  rounds = 100
  for key in jax.random.split(jax.random.key(0), rounds):
    out = run(key)
    before = X
    for layer in range(DEPTH):
      block = out[f'block{layer:02d}']
      for f in ('sa', 'mlp'):
        gone = np.all(block[f'+{f}'] == before, axis=(1, 2))
        added = (block[f'+{f}'] - before)[~gone]
        rate = 0.6 * layer / (DEPTH - 1)
        kept = np.asarray(block[f])[~gone] / (1 - rate)
        np.testing.assert_allclose(added, kept, rtol=1e-3, atol=1e-4)
        dropped[layer, f] += gone.sum()
        before = block[f'+{f}']
  for (layer, f), count in dropped.items():
    rate, n = 0.3 * layer, rounds * len(X)
    deviation = np.sqrt(n * rate * (1 - rate))
    assert abs(count - n * rate) <= 4 * deviation, (layer, f, count)


def test_without_training_nothing_is_left_out():
  encoder, plain = _encoder(stochastic_depth=0.6), _encoder()
  params = _init(plain)
  _check_equal(
    _loss_and_grads(encoder, params, train=False),
    _loss_and_grads(plain, params, train=False),
    rtol=0,
  )


def test_sub_ln_has_its_own_initial_values():
  """√(ln 2N) times as large, but for queries and keys."""
  image = jnp.zeros((1, 8, 8, 3))

  def kernels(**options):
    model = vit.Model(**VIT, patch_size=4, **options)
    params = jax.jit(model.init)(jax.random.key(0), image)['params']
    block = params['Transformer']['encoderblock_1']
    attention = block['MultiHeadDotProductAttention_0']
    found = {name: attention[name] for name in ('query', 'key', 'value', 'out')}
    return {
      name: layer['kernel']
      for name, layer in {**found, **block['MlpBlock_0']}.items()
      if 'kernel' in layer
    }

  plain, subln = kernels(), kernels(sublayer_norm='subln')
  assert plain.keys() == subln.keys()
  for name, kernel in subln.items():
    gain = 1 if name in ('query', 'key') else np.sqrt(np.log(2 * DEPTH))
    np.testing.assert_allclose(kernel, gain * plain[name], rtol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_parameters_and_outputs_on_any_mesh(scan):
  """Initial values to the bit; outputs of 1, 2 and 8 devices to rounding."""
  model = vit.Model(5, **VIT, patch_size=4, patch_norm='dual', scan=scan)
  params, logits = [], []
  for devices in (1, 2, 8):
    layout = Layout(make_mesh(devices=jax.devices()[:devices]))
    init = jax.jit(model.init, out_shardings=layout.replicated)
    params.append(init(jax.random.key(0), IMAGE[:1]))
    apply = jax.jit(lambda p, x: model.apply(p, x)[1]['pre_logits'])
    logits.append(apply(params[-1], jax.device_put(IMAGE, layout.over_batch)))
  for other in (1, 2):
    _check_equal(params[0], params[other], rtol=0)
    _check_equal(logits[0], logits[other], rtol=1e-5, atol=1e-5)


def test_attention_is_fused_where_there_is_a_kernel_for_it():
  def device(platform, capability=None):
    return types.SimpleNamespace(
      platform=platform, compute_capability=capability
    )

  fused = common.has_fused_attention
  bfloat16, float32 = jnp.dtype('bfloat16'), jnp.dtype('float32')
  assert fused(device('gpu', '9.0'), bfloat16, 64)
  assert fused(device('gpu', '8.0'), bfloat16, 128)
  assert not fused(device('gpu', '7.5'), bfloat16, 64)
  assert not fused(device('gpu', '9.0'), float32, 64)
  assert not fused(device('gpu', '9.0'), bfloat16, 12)
  assert not fused(device('gpu', '9.0'), bfloat16, 256)
  assert not fused(device('cpu'), bfloat16, 64)
  assert not fused(device('tpu'), bfloat16, 64)
