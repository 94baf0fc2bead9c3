"""Schedules against closed forms, updates against plain numpy."""

import jax
import ml_collections
import numpy as np
import optax
import pytest

from big_vision_dpn import optim
from big_vision_dpn.config import ConfigError

TOTAL = 100


def _schedule(**kw):
  return optim.make_schedule(TOTAL, batch_size=10, data_size=50, **kw)


@pytest.mark.parametrize(
  ('kw', 'expected'),
  [
    ({}, lambda s: 1.0),
    (
      {'decay_type': 'cosine'},
      lambda s: (1 + np.cos(np.pi * s / 100)) / 2,
    ),
    (
      {'decay_type': 'cosine', 'warmup_steps': 20},
      lambda s: s / 20 if s < 20 else (1 + np.cos(np.pi * (s - 20) / 80)) / 2,
    ),
    ({'decay_type': 'linear'}, lambda s: 1 - s / 100),
    (
      {'decay_type': 'linear', 'linear_end': 0.1, 'warmup_percent': 0.2},
      lambda s: s / 20 if s < 20 else 1 - 0.9 * (s - 20) / 80,
    ),
    (
      {'decay_type': 'polynomial', 'power': 2, 'end': 0.5},
      lambda s: 0.5 + 0.5 * (1 - s / 100) ** 2,
    ),
    (
      {'decay_type': 'rsqrt', 'timescale_steps': 10, 'warmup_epochs': 4},
      lambda s: s / 20 if s < 20 else (1 + (s - 20) / 10) ** -0.5,
    ),
    (
      {'decay_type': 'rsqrt', 'timescale_steps': 10, 'shift_steps': 30},
      lambda s: (1 + (s + 30) / 10) ** -0.5,
    ),
    (
      {'decay_type': 'constant', 'cooldown_examples': 250},
      lambda s: min(1, (100 - s) / 25),
    ),
    (
      {'decay_type': 'stair', 'steps': [30, 60], 'mults': [0.1, 0.01]},
      lambda s: 1 if s < 30 else 0.1 if s < 60 else 0.01,
    ),
  ],
)
def test_schedule(kw, expected):
  schedule = _schedule(**kw)
  steps = [0, 1, 10, 19, 20, 21, 29, 30, 50, 59, 60, 75, 76, 99, 100]
  actual = [float(schedule(s)) for s in steps]
  np.testing.assert_allclose(actual, [expected(s) for s in steps], atol=1e-6)


@pytest.mark.parametrize(
  'kw',
  [
    {'decay_type': 'cos'},
    {'decay_type': 'cosine', 'warmup': 3},
    {'decay_type': 'cosine', 'power': 3},
    {'decay_type': 'rsqrt', 'timescale': 10},
    {'warmup_steps': 80, 'cooldown_steps': 30},
    {'decay_type': 'stair', 'steps': [10, 20], 'mults': [0.1]},
    {'decay_type': 'stair', 'steps': [20, 10], 'mults': [0.1, 0.01]},
    {'warmup_steps': 1, 'warmup_epochs': 1},
  ],
)
def test_schedule_mistakes(kw):
  with pytest.raises(ConfigError):
    _schedule(**kw)


def _config(**kw):
  config = {
    'optax_name': 'identity',
    'optax': {},
    'lr': 0.5,
    'lr_layer_decay': None,
    'lr_mults': (),
    'wd': None,
    'wd_mults': (('.*/kernel$', 1.0),),
    'schedule': {},
    'grad_clip_norm': None,
  }
  return ml_collections.ConfigDict({**config, **kw})


def _tree(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    'body': {'kernel': draw(3, 2), 'bias': draw(2)},
    'head': {'kernel': draw(2, 4), 'bias': draw(4)},
  }


def _run(config, steps):
  """Parameters after updates with the gradients _tree(1), _tree(2), …"""
  params = _tree(0)
  tx, _ = optim.make(config, params, total_steps=10, batch_size=8)
  state = tx.init(params)
  for i in range(steps):
    updates, state = jax.jit(tx.update)(_tree(1 + i), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def _assert_close(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6),
    actual,
    expected,
  )


def test_sgd_with_decay_schedule_and_lr_mults():
  config = _config(
    wd=0.1,
    wd_mults=(('head/kernel', 2.0), ('.*/kernel', 1.0)),
    lr_mults=(('head/.*', 10.0),),
    schedule={'decay_type': 'linear'},
  )
  expected = _tree(0)
  wd_mult = {'body': 1.0, 'head': 2.0}
  for i in range(3):
    grads, multiplier = _tree(1 + i), 1 - i / 10
    for part, leaves in expected.items():
      for name in leaves:
        step = 0.5 * grads[part][name] * (10 if part == 'head' else 1)
        if name == 'kernel':
          # Decay follows the schedule; neither lr nor lr_mults touch it.
          step = step + 0.1 * wd_mult[part] * leaves[name]
        leaves[name] = leaves[name] - multiplier * step
  _assert_close(_run(config, 3)[0], expected)


def test_adam_against_its_formula():
  config = _config(optax_name='scale_by_adam', optax={'b2': 0.95}, lr=0.01)
  expected, mu, nu = _tree(0), _tree(0), _tree(0)
  zero = lambda tree: jax.tree.map(np.zeros_like, tree)
  mu, nu = zero(mu), zero(nu)
  for i in range(1, 4):
    grads = _tree(i)
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, nu, grads)
    expected = jax.tree.map(
      lambda p, m, v, i=i: (
        p - 0.01 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8)
      ),
      expected,
      mu,
      nu,
    )
  _assert_close(_run(config, 3)[0], expected)


def test_momentum():
  config = _config(
    optax_name='big_vision.momentum_hp', optax={'dtype': 'float32'}
  )
  expected = _tree(0)
  velocity = jax.tree.map(np.zeros_like, expected)
  for i in range(1, 4):
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, _tree(i))
    expected = jax.tree.map(lambda p, v: p - 0.5 * v, expected, velocity)
  _assert_close(_run(config, 3)[0], expected)


def test_clipping_and_freezing():
  config = _config(
    schedule=[('head/.*', None), ('.*', {})], grad_clip_norm=0.25, wd=0.1
  )
  params, _ = _run(config, 1)
  grads, expected = _tree(1), _tree(0)
  # The norm is that of the gradients which are used.
  norm = np.sqrt(sum((g**2).sum() for g in grads['body'].values()))
  assert norm > 0.25
  for name, p in expected['body'].items():
    decay = 0.1 * p if name == 'kernel' else 0
    p = p - (0.5 * grads['body'][name] * 0.25 / norm + decay)
    np.testing.assert_allclose(params['body'][name], p, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, params['head'], expected['head'])


def test_frozen_parameters_have_no_optimizer_state():
  config = _config(
    optax_name='scale_by_adam', schedule=[('head/.*', None), ('.*', {})]
  )
  _, state = _run(config, 1)
  sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
  assert sum(sizes) == 2 * (3 * 2 + 2)


@pytest.mark.parametrize('scan', [False, True])
def test_layer_decay(scan):
  """BEiT's: of 0.5 and two blocks 1/8, 1/4, 1/2, 1."""
  ones = lambda *shape: np.ones(shape, np.float32)
  blocks = {'encoderblock_0': {'w': ones(3)}, 'encoderblock_1': {'w': ones(3)}}
  if scan:
    blocks = {'encoderblock': {'w': ones(2, 3)}}
  params = {
    'embedding': {'dense': {'kernel': ones(4, 3)}},
    'pos_embedding': ones(1, 4, 3),
    'Transformer': {**blocks, 'encoder_norm': {'scale': ones(3)}},
    'head': {'kernel': ones(3, 2)},
  }
  config = _config(lr=2.0, lr_layer_decay=0.5, wd=None)
  tx, _ = optim.make(config, params, total_steps=10, batch_size=8)
  updates, _ = tx.update(params, tx.init(params), params)
  expected = jax.tree.map(lambda p: -2 * p, params)
  for name in ('embedding', 'pos_embedding'):
    expected[name] = jax.tree.map(lambda p: p / 8, expected[name])
  encoder = expected['Transformer']
  if scan:
    encoder['encoderblock']['w'] *= np.float32([[0.25], [0.5]])
  else:
    encoder['encoderblock_0']['w'] /= 4
    encoder['encoderblock_1']['w'] /= 2
  _assert_close(updates, expected)


def test_bfloat16_first_moment():
  config = _config(optax_name='scale_by_adam', optax={'mu_dtype': 'bfloat16'})
  params, state = _run(config, 1)
  dtypes = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim}
  assert dtypes == {'bfloat16', 'float32'}
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


@pytest.mark.parametrize(
  ('kw', 'message'),
  [
    ({'optax_name': 'adam'}, "unknown optimizer 'adam'"),
    ({'optax_name': 'scale_by_adam', 'optax': {'beta': 1}}, "'beta'"),
    ({'wd': 1, 'wd_mults': (('kernel', 1),)}, 'config.wd_mults'),
    ({'lr_mults': (('tail/.*', 1),)}, 'config.lr_mults'),
    ({'schedule': [('head/.*', {})]}, 'no pattern matches body/bias'),
    ({'lr_layer_decay': 0.5}, 'config.lr_layer_decay: the model has no blocks'),
    ({'schedule': [('.*', None)]}, 'freezes every parameter'),
  ],
)
def test_mistakes(kw, message):
  with pytest.raises(ConfigError) as e:
    optim.make(_config(**kw), _tree(0), total_steps=10, batch_size=8)
  assert message in str(e.value)
