"""Where the rows of a batch lie, on one process and on two."""

import jax
import numpy as np
import pytest
import several_processes
from flax import traverse_util
from jax.sharding import PartitionSpec

from big_vision_dpn import pytree, sharding
from big_vision_dpn.config import ConfigError

LAYOUT = sharding.Layout()


def test_the_mesh_has_all_devices():
  mesh = sharding.make_mesh()
  assert mesh.axis_names == ('data',)
  assert list(mesh.devices) == jax.devices()
  assert len(jax.devices()) == 8  # Otherwise the tests here show little.


@pytest.mark.parametrize(
  ('axes', 'shape'),
  [
    ([('data', 8)], {'data': 8}),
    ([('data', -1), ('model', 2)], {'data': 4, 'model': 2}),
    ([['a', 2], ['b', -1], ['c', 2]], {'a': 2, 'b': 2, 'c': 2}),
  ],
)
def test_meshes_of_several_axes(axes, shape):
  mesh = sharding.make_mesh(axes)
  assert dict(mesh.shape) == shape
  assert {d.id for d in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(
  'axes',
  [
    [('data', 4)],
    [('data', 3), ('model', -1)],
    [('data', -1), ('model', -1)],
    [('data', 4), ('data', 2)],
    [('data', 0)],
    [('data', 16)],
    ['data'],
    [('data', '8')],
    [],
  ],
)
def test_no_mesh_of_eight_devices(axes):
  with pytest.raises(ConfigError, match=r'expected pairs|no mesh of 8 devices'):
    sharding.make_mesh(axes)


def test_specs():
  assert LAYOUT.replicated.spec == PartitionSpec()
  assert LAYOUT.over_batch.spec == PartitionSpec('data')
  array = jax.device_put(np.arange(16), LAYOUT.replicated)
  assert {s.data.shape for s in array.addressable_shards} == {(16,)}


def test_the_batch_is_over_the_axes_of_the_rules():
  mesh = sharding.make_mesh([('a', 2), ('b', 2), ('model', 2)])
  layout = sharding.Layout(mesh, [('act_batch', ('a', 'b'))])
  array = jax.device_put(np.arange(16), layout.over_batch)
  assert {s.data.shape for s in array.addressable_shards} == {(4,)}
  assert layout.local_rows(16) == list(range(16))
  with pytest.raises(ConfigError, match="unknown axis of the mesh 'c'"):
    sharding.Layout(mesh, [('act_batch', 'c')])
  with pytest.raises(ConfigError, match='multiple of the 4 devices'):
    layout.check_batch_size(6)


def test_one_process_holds_every_row():
  assert LAYOUT.local_rows(24) == list(range(24))


def test_put_batch_keeps_the_order_of_the_rows():
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.random((16, 3, 2), np.float32),
    'label': np.arange(16, dtype=np.int32),
  }
  arrays = LAYOUT.put_batch(batch)
  assert arrays.keys() == batch.keys()
  for key, array in arrays.items():
    assert array.dtype == batch[key].dtype
    np.testing.assert_array_equal(array, batch[key])
    for i, device in enumerate(LAYOUT.mesh.devices):
      (shard,) = (s for s in array.addressable_shards if s.device == device)
      np.testing.assert_array_equal(shard.data, batch[key][2 * i : 2 * i + 2])


@pytest.mark.parametrize('batch_size', [8, 16, 1024])
def test_batch_sizes_that_the_devices_divide(batch_size):
  LAYOUT.check_batch_size(batch_size)


@pytest.mark.parametrize(
  ('batch_size', 'near'),
  [(12, '16'), (17, '16'), (3, '8'), (0, '8'), (-8, '8')],
)
def test_batch_sizes_that_they_do_not(batch_size, near):
  with pytest.raises(ConfigError) as e:
    LAYOUT.check_batch_size(batch_size)
  message = str(e.value)
  assert message.startswith(f'{batch_size}: ')
  assert 'multiple of the 8 devices (1 processes)' in message
  assert message.endswith(f'e.g. {near}')


def test_activations_lie_as_the_rules_say():
  mesh = sharding.make_mesh([('data', 4), ('model', 2)])
  rules = [('act_batch', 'data'), ('act_mlp', 'model')]

  def f(x):
    return sharding.constrain(x + 1, 'act_batch', 'act_len', 'act_mlp')

  x = np.zeros((8, 3, 6), np.float32)
  with sharding.Layout(mesh, rules).activated():
    y = jax.jit(f)(x)
  assert {s.data.shape for s in y.addressable_shards} == {(2, 3, 3)}
  assert len(jax.jit(f)(x).addressable_shards) == 1


# Names and shapes of a ViT's parameters, in bytes far apart.
BLOCK = 'Transformer/encoderblock_0'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_0'
PARAMS = {
  'embedding/kernel': (16, 16, 3, 1024),  # 3 MB
  'pos_embedding': (1, 196, 1024),
  f'{ATTENTION}/query/kernel': (1024, 16, 64),  # 4 MiB, and so not more
  f'{ATTENTION}/query/bias': (16, 64),
  f'{ATTENTION}/out/kernel': (16, 64, 1024),
  f'{BLOCK}/MlpBlock_0/Dense_0/kernel': (1024, 4096),  # 16 MB
  f'{BLOCK}/MlpBlock_0/Dense_0/bias': (4096,),
  f'{BLOCK}/MlpBlock_0/Dense_1/kernel': (4096, 1024),
  'head/kernel': (1024, 21_843),  # 89 MB, of an odd number of classes
}


def _specs(strategy, axes=(('data', -1),), params=PARAMS, **more):
  tree = lambda shapes: traverse_util.unflatten_dict(
    {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in shapes.items()},
    sep='/',
  )
  state = {'params': tree(params), **{k: tree(v) for k, v in more.items()}}
  placed = sharding.infer_state(state, strategy, sharding.make_mesh(axes))
  return {
    name: tuple(s.spec)
    for name, s in pytree.flatten_with_names(placed).items()
    if any(s.spec)
  }


def test_fsdp_splits_the_largest_dimension_of_what_is_large():
  assert _specs([('.*', 'fsdp(axis="data")')]) == {
    f'params/{BLOCK}/MlpBlock_0/Dense_0/kernel': (None, 'data'),
    f'params/{BLOCK}/MlpBlock_0/Dense_1/kernel': ('data', None),
    'params/head/kernel': ('data', None),
  }


def test_fsdp_over_two_axes_and_of_small_tensors():
  specs = _specs(
    [('head/.*', 'replicate'), ('.*', 'fsdp(("a", "b"), 0.1)')],
    [('a', 4), ('b', 2)],
  )
  assert specs[f'params/{ATTENTION}/query/kernel'] == (('a', 'b'), None, None)
  assert 'params/head/kernel' not in specs
  assert f'params/{ATTENTION}/query/bias' not in specs


def test_tensor_parallelism_is_of_heads_and_hidden_units():
  mesh = [('data', 4), ('model', 2)]
  specs = _specs([('.*', 'tensor_parallel("model")|fsdp("data")')], mesh)
  assert specs == {
    f'params/{ATTENTION}/query/kernel': (None, 'model', None),
    f'params/{ATTENTION}/query/bias': ('model', None),
    f'params/{ATTENTION}/out/kernel': ('model', None, None),
    f'params/{BLOCK}/MlpBlock_0/Dense_0/kernel': ('data', 'model'),
    f'params/{BLOCK}/MlpBlock_0/Dense_0/bias': ('model',),
    f'params/{BLOCK}/MlpBlock_0/Dense_1/kernel': ('model', 'data'),
    'params/head/kernel': ('data', None),
  }


def test_what_belongs_to_a_parameter_follows_it():
  kernel = f'{BLOCK}/MlpBlock_0/Dense_0/kernel'
  specs = _specs(
    [('.*', 'shard_dim("data", -1)')],
    params={kernel: (1024, 4096)},
    opt={
      f'0/mu/{kernel}': (1024, 4096),
      f'0/v_row/{kernel}': (1024,),
      f'0/v/{kernel}': (1,),
      'count': (),
    },
  )
  assert specs == {
    f'params/{kernel}': (None, 'data'),
    f'opt/0/mu/{kernel}': (None, 'data'),
    f'opt/0/v_row/{kernel}': ('data',),
  }


@pytest.mark.parametrize(
  ('strategy', 'message'),
  [
    ([('.*', 'fspd("data")')], "unknown strategy 'fspd'.*mean 'fsdp'"),
    ([('.*', 'fsdp("date")')], "unknown axis of the mesh 'date'.*'data'"),
    ([('.*', 'fsdp(axes="data")')], "argument of strategy fsdp 'axes'"),
    ([('.*', 'fsdp()')], "'fsdp\\(\\)': .*axis"),
    ([('.*', 'fsdp(')], 'expected a strategy such as fsdp'),
    ([('blocks/.*', 'fsdp("data")')], "'blocks/.*' matches none"),
    ([('head/.*', 'shard_dim("data", 2)')], 'head/kernel .* no dimension 2'),
    ([('head/.*', 'shard_dim("data", 1)')], 'head/kernel .*1 cannot be split'),
    (
      [('head/.*', 'shard_dim("data", 0)|shard_dim("data", 0)')],
      "cannot be split.*as 'data' has it",
    ),
    (['fsdp'], 'expected a list of .regex, value. pairs'),
  ],
)
def test_mistakes_in_a_strategy(strategy, message):
  with pytest.raises(ConfigError, match=message):
    _specs(strategy)


def test_without_a_cluster_nothing_is_initialized(monkeypatch):
  for marker in sharding._CLUSTER_MARKERS:
    monkeypatch.delenv(marker, raising=False)
  # jax would raise, since its devices are in use: see the next test.
  sharding.initialize_processes()
  assert jax.process_count() == 1


@pytest.mark.parametrize(
  'marker', ['JAX_COORDINATOR_ADDRESS', 'SLURM_STEP_NODELIST']
)
def test_failure_to_join_a_cluster_is_loud(monkeypatch, marker):
  monkeypatch.setenv(marker, 'localhost:1')
  with pytest.raises(RuntimeError, match='must be called before'):
    sharding.initialize_processes()


_PROCESS = """
import json
from big_vision_dpn import sharding
sharding.initialize_processes()
import jax
import numpy as np

layout = sharding.Layout()
rows = layout.local_rows(8)
x = np.random.default_rng(0).random((8, 3), np.float32)  # The global batch.
batch = layout.put_batch({'x': x[rows]})
mean = jax.jit(
  lambda x: x.mean(axis=0), out_shardings=layout.replicated
)(batch['x'])
try:
  layout.check_batch_size(6)
except ValueError as e:
  message = str(e)
print(json.dumps({
  'process': jax.process_index(),
  'processes': jax.process_count(),
  'devices': jax.device_count(),
  'rows': rows,
  'shape': batch['x'].shape,
  'held': {
    s.index[0].start: np.asarray(s.data).tolist()
    for s in batch['x'].addressable_shards
  },
  'mean': np.asarray(mean).tolist(),
  'message': message,
}))
"""


@pytest.fixture(scope='module')
def two_processes() -> list[dict]:
  """What each of two processes, of two devices each, says of one batch."""
  return several_processes.run('-c', _PROCESS, processes=2, devices=2)


def test_processes_join_by_the_environment(two_processes):
  assert [p['process'] for p in two_processes] == [0, 1]
  assert [p['processes'] for p in two_processes] == [2, 2]
  assert [p['devices'] for p in two_processes] == [4, 4]
  for p in two_processes:
    assert '4 devices (2 processes)' in p['message']


def test_processes_share_the_rows_out(two_processes):
  first, second = (p['rows'] for p in two_processes)
  assert len(first) == len(second) == 4
  assert sorted(first + second) == list(range(8))


def test_processes_make_one_global_batch(two_processes):
  x = np.random.default_rng(0).random((8, 3), np.float32)
  for p in two_processes:
    assert p['shape'] == [8, 3]
    held = {int(start): rows for start, rows in p['held'].items()}
    assert [s + i for s in sorted(held) for i in (0, 1)] == p['rows']
    for start, rows in held.items():
      np.testing.assert_array_equal(np.float32(rows), x[start : start + 2])
    np.testing.assert_allclose(p['mean'], np.float64(x).mean(0), rtol=1e-6)
