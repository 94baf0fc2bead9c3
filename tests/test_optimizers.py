"""Optimizers against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from big_vision_dpn import optimizers
from big_vision_dpn.models import vit


def _grads(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _updates(optimizer, shape, steps):
  params = {'kernel': np.zeros(shape, np.float32)}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  updates = []
  for step in range(steps):
    u, state = update({'kernel': _grads(step, shape)}, state, params)
    updates.append(u['kernel'])
  return updates


@pytest.mark.parametrize('shape', [(40, 50), (3, 50, 40), (8, 40)])
def test_adafactor(shape):
  """Zhai et al.: factored where two dimensions have 32, capped decay."""
  factored = sum(n >= 32 for n in shape) >= 2
  rows = np.zeros(shape[:-1]) if factored else np.zeros(shape)
  columns = np.zeros((*shape[:-2], shape[-1]))
  average = np.zeros(shape)
  optimizer = optimizers.scale_by_adafactor(
    dtype_momentum='float32', beta2_cap=0.5
  )
  actual = _updates(optimizer, shape, 5)
  for step in range(5):
    g = _grads(step, shape).astype(np.float64)
    decay = min(0.5, 1 - (step + 1) ** -0.8)
    if factored:
      rows = decay * rows + (1 - decay) * (g**2).mean(-1)
      columns = decay * columns + (1 - decay) * (g**2).mean(-2)
      v = rows[..., None] * columns[..., None, :]
      v = v / rows.mean(-1)[..., None, None]
    else:
      v = rows = decay * rows + (1 - decay) * g**2
    average = 0.9 * average + 0.1 * g / np.sqrt(v)
    np.testing.assert_allclose(actual[step], average, rtol=1e-4, atol=1e-6)


def test_adafactor_clips_and_goes_without_momentum():
  plain, clipped = (
    _updates(
      optimizers.scale_by_adafactor(momentum=None, clipping_threshold=c),
      (40, 50),
      1,
    )[0]
    for c in (None, 0.25)
  )
  rms = np.sqrt((plain**2).mean())
  assert rms > 0.5
  np.testing.assert_allclose(clipped, plain * 0.25 / rms, rtol=1e-5)


def test_adafactors_state_is_small():
  params = {'kernel': np.zeros((64, 100), np.float32)}
  state = optimizers.scale_by_adafactor().init(params)
  momentum = [x for x in jax.tree.leaves(state) if x.shape == (64, 100)]
  (momentum,) = momentum
  assert momentum.dtype == jnp.bfloat16
  rest = sum(x.size for x in jax.tree.leaves(state)) - momentum.size
  assert rest < 64 + 100 + 10


def test_lion():
  """Chen et al., arXiv 2302.06675, algorithm 2."""
  actual = _updates(optimizers.OPTIMIZERS['scale_by_lion'](), (4, 5), 4)
  momentum = np.zeros((4, 5))
  for step in range(4):
    g = _grads(step, (4, 5))
    expected = np.sign(0.9 * momentum + 0.1 * g)
    momentum = 0.99 * momentum + 0.01 * g
    np.testing.assert_array_equal(actual[step], expected)


@pytest.mark.parametrize('scan', [False, True])
def test_muon(scan):
  """Matrices of blocks become orthogonal; everything else has Adam's step."""
  model = vit.Model(
    5, width=12, depth=2, mlp_dim=24, num_heads=3, patch_size=4, scan=scan
  )
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  params = shapes['params']
  names = traverse_util.flatten_dict(params, sep='/')
  grads = {
    name: _grads(i, a.shape) for i, (name, a) in enumerate(names.items())
  }
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape), params)
  tree = traverse_util.unflatten_dict(grads, sep='/')
  optimizer = optimizers.muon(ns_steps=12, nesterov=False)
  updates, _ = optimizer.update(tree, optimizer.init(zeros), zeros)
  adam = optax.scale_by_adam()
  expected, _ = adam.update(tree, adam.init(zeros), zeros)
  expected = traverse_util.flatten_dict(expected, sep='/')

  matrices = set()
  for name, u in traverse_util.flatten_dict(updates, sep='/').items():
    if not ('Transformer' in name and name.endswith('/kernel')):
      np.testing.assert_allclose(u, expected[name], rtol=1e-5, err_msg=name)
      continue
    matrices.add(name.split('/')[-2])
    inputs = 12 if name.split('/')[-2] in ('query', 'key', 'value') else None
    for layer in u if scan else [u]:
      rows = inputs or layer.size // layer.shape[-1]
      matrix = np.asarray(layer).reshape(rows, -1)
      singular = np.linalg.svd(matrix, compute_uv=False)
      # Newton-Schulz brings singular values into a band around 1.
      unit = 0.2 * np.sqrt(max(matrix.shape))
      assert (abs(singular / unit - 1) < 0.35).all(), (name, singular / unit)
  assert matrices == {'query', 'key', 'value', 'out', 'Dense_0', 'Dense_1'}
