"""Checkpoints: bit for bit, safe from donation, and from damage to files."""

import gc
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from big_vision_dpn import checkpoint, sharding
from big_vision_dpn import config as config_lib
from big_vision_dpn.checkpoint import Checkpointer
from big_vision_dpn.config import ConfigError

pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def _mesh(devices):
  return sharding.make_mesh(devices=jax.devices()[:devices])


def _arrays(seed):
  """A training state as numpy arrays, float32, bfloat16 and int32."""
  rng = np.random.default_rng(seed)
  params = {
    # So large that it has a file of its own within the checkpoint.
    'kernel': rng.normal(size=(64, 96)).astype(np.float32),
    'block': {'bias': np.float32([seed, np.nan, np.inf, -0.0])},
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(mu_dtype=jnp.bfloat16),
    optax.masked(optax.trace(0.9), {'kernel': True, 'block': False}),
  )
  opt = jax.tree.map(
    lambda x: np.asarray(rng.normal(size=x.shape) * 100).astype(x.dtype),
    jax.eval_shape(optimizer.init, params),
  )
  return {'params': params, 'opt': opt}


def _state(seed, mesh):
  return jax.device_put(_arrays(seed), sharding.Layout(mesh).replicated)


def _target(mesh):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.Layout(mesh).replicated
    ),
    _arrays(0),
  )


def _assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in pairs:
    assert (a.shape, a.dtype) == (e.shape, e.dtype)
    for shard in getattr(a, 'addressable_shards', [a]):
      assert np.asarray(shard.data).tobytes() == np.asarray(e).tobytes()


def _restore(workdir, mesh):
  checkpointer = Checkpointer(str(workdir))
  result = checkpointer.restore_newest(_target(mesh))
  checkpointer.close()
  return result


def _assert_restores(workdir, step):
  restored, state, extra = _restore(workdir, _mesh(8))
  assert (restored, extra) == (step, {'step': step})
  _assert_same_bits(state, _arrays(step))


def _save(workdir, steps, keep_every=None):
  checkpointer = Checkpointer(str(workdir), keep_every)
  for step in steps:
    checkpointer.save(step, _state(step, _mesh(8)), {'step': step})
  checkpointer.close()


def _steps(workdir, folder='checkpoints'):
  names = os.listdir(os.path.join(workdir, folder))
  return sorted(int(name) for name in names)


@pytest.mark.parametrize(('before', 'after'), [(1, 8), (8, 1)])
def test_round_trip_between_meshes(tmp_path, before, after):
  extra = {'chrono': {'train_seconds': 0.1}, 'text': 'ä', 'none': None}
  dtypes = {x.dtype.name for x in jax.tree.leaves(_arrays(1))}
  assert dtypes == {'float32', 'bfloat16', 'int32'}
  checkpointer = Checkpointer(str(tmp_path))
  checkpointer.save(71_300, _state(1, _mesh(before)), extra)
  checkpointer.close()
  mesh = _mesh(after)
  step, state, restored_extra = _restore(tmp_path, mesh)
  assert (step, restored_extra) == (71_300, extra)
  _assert_same_bits(state, _arrays(1))
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding == sharding.Layout(mesh).replicated


def test_sharded_arrays(tmp_path):
  x = np.arange(64, dtype=np.float32).reshape(16, 4)
  checkpointer = Checkpointer(str(tmp_path))
  saved = jax.device_put(x, sharding.Layout(_mesh(8)).over_batch)
  checkpointer.save(1, {'x': saved}, {})
  layout = sharding.Layout(_mesh(2)).over_batch
  target = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)}
  checkpointer.close()
  _, state, _ = Checkpointer(str(tmp_path)).restore_newest(target)
  assert state['x'].sharding == layout
  np.testing.assert_array_equal(state['x'], x)


@pytest.mark.parametrize(
  ('devices', 'layout'),
  [
    (1, 'replicated'),
    (8, 'replicated'),
    (8, 'over_batch'),
  ],
)
def test_arrays_may_be_donated_as_soon_as_save_returns(
  tmp_path, devices, layout
):
  # Megabytes, so that they are still being written meanwhile. Memory that
  # jax has from numpy might not be donated, so the arrays are jax's own.
  layout = getattr(sharding.Layout(_mesh(devices)), layout)
  expected = np.random.default_rng(0).random((4, 256, 1024), np.float32)
  state = {
    str(i): jax.jit(jnp.copy, out_shardings=layout)(x)
    for i, x in enumerate(expected)
  }
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: -2 * x, s), donate_argnums=0
  )
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), state
  )
  checkpointer = Checkpointer(str(tmp_path))
  checkpointer.save(1, state, {})
  for _ in range(10):
    state = overwrite(state)
  jax.block_until_ready(state)
  checkpointer.close()
  _, restored, _ = Checkpointer(str(tmp_path)).restore_newest(target)
  for i, x in enumerate(expected):
    np.testing.assert_array_equal(restored[str(i)], x)


def test_the_newest_two_and_multiples_of_keep_every_are_kept(tmp_path):
  _save(tmp_path, [3, 10, 13, 20, 23, 27], keep_every=10)
  assert _steps(tmp_path) == [10, 20, 23, 27]
  _assert_restores(tmp_path, 27)


def test_without_keep_every_the_newest_two_are_kept(tmp_path):
  _save(tmp_path, [1, 2, 3])
  assert _steps(tmp_path) == [2, 3]


def test_without_a_checkpoint(tmp_path):
  assert _restore(tmp_path, _mesh(8)) is None


def _largest_file(folder):
  files = [
    os.path.join(path, name)
    for path, _, names in os.walk(folder)
    for name in names
  ]
  return max(files, key=os.path.getsize)


def _truncate(folder):
  path = _largest_file(folder)
  os.truncate(path, os.path.getsize(path) // 2)


def _fill_with_zeros(folder):
  """As some file systems do when the power fails."""
  path = _largest_file(folder)
  size = os.path.getsize(path)
  with open(path, 'wb') as f:
    f.write(bytes(size))


def _empty(folder):
  shutil.rmtree(folder)
  os.mkdir(folder)


def _garble_the_extra(folder):
  with open(os.path.join(folder, 'extra', 'metadata'), 'w') as f:
    f.write('{"step": ')


DAMAGES = {
  'data cut off': _truncate,
  'data lost': lambda folder: os.remove(_largest_file(folder)),
  'data of zeros': _fill_with_zeros,
  'state lost': lambda folder: shutil.rmtree(os.path.join(folder, 'state')),
  'extra lost': lambda folder: shutil.rmtree(os.path.join(folder, 'extra')),
  'extra cut off': _garble_the_extra,
  'empty': _empty,
}


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two_checkpoints')
  _save(workdir, [5, 9])
  return workdir


@pytest.fixture
def workdir(tmp_path, two_checkpoints):
  """A copy of a workdir with the checkpoints 5 and 9."""
  yield shutil.copytree(two_checkpoints, tmp_path / 'workdir')
  # Orbax leaves coroutines behind where a file is damaged. They complain when
  # they are collected: here, where pytest is told to ignore it.
  gc.collect()


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(workdir, damage, caplog):
  _assert_restores(workdir, 9)  # The damage is the only reason.
  damage(workdir / 'checkpoints' / '9')
  _assert_restores(workdir, 5)
  warnings = [r.getMessage() for r in caplog.records if 'damaged' in r.msg]
  assert len(warnings) == 1
  assert str(workdir / 'checkpoints' / '9') in warnings[0]
  assert _steps(workdir) == [5]
  assert _steps(workdir, 'damaged_checkpoints') == [9]


def test_training_goes_on_behind_a_damaged_checkpoint(workdir):
  """More than once: the same step is saved, damaged, and saved again."""
  for _ in range(2):
    _truncate(workdir / 'checkpoints' / '9')
    checkpointer = Checkpointer(str(workdir))
    mesh = _mesh(8)
    step, state, _ = checkpointer.restore_newest(_target(mesh))
    assert step == 5
    _assert_same_bits(state, _arrays(5))
    checkpointer.save(9, _state(9, mesh), {'step': 9})
    checkpointer.close()
    assert _steps(workdir) == [5, 9]
    _assert_restores(workdir, 9)
    assert _steps(workdir, 'damaged_checkpoints') == [9]


def test_when_all_are_damaged_no_start_takes_the_run_for_a_new_one(workdir):
  for step in ('5', '9'):
    _truncate(workdir / 'checkpoints' / step)
  for _ in range(2):  # A scheduler would start it again.
    with pytest.raises(RuntimeError) as e:
      _restore(workdir, _mesh(8))
    assert '[9, 5]' in str(e.value)
    assert str(workdir / 'checkpoints') in str(e.value)
  assert _steps(workdir) == [5, 9]


def test_a_half_written_checkpoint_is_ignored(workdir):
  """Until a checkpoint is whole, Orbax writes under such a name."""
  folder = workdir / 'checkpoints'
  half = shutil.copytree(folder / '9', folder / '12.orbax-checkpoint-tmp')
  shutil.rmtree(half / 'extra')
  _truncate(half)
  _assert_restores(workdir, 9)
  assert _steps(workdir) == [5, 9]  # It takes no room either.


def test_another_model_does_not_count_as_damage_for_ever(workdir):
  """Say, code that has changed: with the old code the run can go on."""
  mesh = _mesh(8)
  target = jax.tree.map(lambda x: x, _target(mesh))
  target['params']['kernel'] = jax.ShapeDtypeStruct(
    (3, 3), np.float32, sharding=sharding.Layout(mesh).replicated
  )
  checkpointer = Checkpointer(str(workdir))
  with pytest.raises(RuntimeError, match='none of the checkpoints'):
    checkpointer.restore_newest(target)
  checkpointer.close()
  _assert_restores(workdir, 9)


def _config(**fields):
  config = ml_collections.ConfigDict(
    {
      'total_steps': 10,
      'lr': 3e-4,
      'input': {'data': {'name': 'x', 'split': 'y'}, 'batch_size': 8},
      'model': {'patch_norm': 'dual', 'patch_size': (7, 7)},
      'schedule': [('.*', {'warmup_steps': 2})],
    },
    type_safe=False,
  )
  config.update(fields)
  return config_lib.resolve(config)


def test_config_json_holds_the_config(tmp_path):
  workdir = tmp_path / 'not' / 'there'
  checkpoint.write_config(str(workdir), _config())
  assert os.listdir(workdir) == ['config.json']
  written = json.loads((workdir / 'config.json').read_text())
  assert written['lr'] == 3e-4
  assert written['model'] == {'patch_norm': 'dual', 'patch_size': [7, 7]}
  assert written['input']['batch_size'] == 8
  checkpoint.write_config(str(workdir), _config(lr=1.0))
  written = json.loads((workdir / 'config.json').read_text())
  assert written['lr'] == 1.0


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'log_training_steps': 3},
    {'ckpt_steps': 7, 'keep_ckpt_steps': 5},
    {'evals': {'val': {'type': 'mean'}}},
    {'input': {'prefetch': 5, 'threads': 1}},
  ],
)
def test_configs_with_which_a_run_may_go_on(tmp_path, fields):
  checkpoint.write_config(str(tmp_path), _config())
  checkpoint.check_workdir(str(tmp_path), _config(**fields))


@pytest.mark.parametrize(
  ('fields', 'lines'),
  [
    ({'lr': 1e-3}, ['lr: 0.0003 there, 0.001 now']),
    ({'wd': 0.1}, ['wd: None there, 0.1 now']),
    (
      {'input': {'batch_size': 16}, 'seed': 1},
      ['input.batch_size: 8 there, 16 now', 'seed: 0 there, 1 now'],
    ),
  ],
)
def test_configs_with_which_it_may_not(tmp_path, fields, lines):
  checkpoint.write_config(str(tmp_path), _config())
  with pytest.raises(ConfigError) as e:
    checkpoint.check_workdir(str(tmp_path), _config(**fields))
  listed = [line.strip() for line in str(e.value).splitlines()[1:-1]]
  assert listed == lines
  assert str(tmp_path) in str(e.value)


def test_a_nested_difference_is_named_with_both_values(tmp_path):
  checkpoint.write_config(str(tmp_path), _config())
  other = _config(model={'patch_norm': 'none'})
  with pytest.raises(ConfigError, match=r"'dual'.* there, .*'none'.* now"):
    checkpoint.check_workdir(str(tmp_path), other)


def test_a_new_workdir_fits_any_config(tmp_path):
  checkpoint.check_workdir(str(tmp_path / 'new'), _config())
  assert not (tmp_path / 'new').exists()


def test_a_config_json_that_cannot_be_read(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"lr": ')
  with pytest.raises(ConfigError, match=re.escape(f'{path} is no JSON')):
    checkpoint.check_workdir(str(tmp_path), _config())
