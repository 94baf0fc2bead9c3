"""Where the rows of a batch lie, on one process and on two."""

import jax
import numpy as np
import pytest
import several_processes
from jax.sharding import PartitionSpec

from big_vision_dpn import sharding
from big_vision_dpn.config import ConfigError


def test_the_mesh_has_all_devices():
  mesh = sharding.make_mesh()
  assert mesh.axis_names == ('data',)
  assert list(mesh.devices) == jax.devices()
  assert len(jax.devices()) == 8  # Otherwise the tests here show little.


def test_specs():
  mesh = sharding.make_mesh()
  assert sharding.replicated(mesh).spec == PartitionSpec()
  assert sharding.over_batch(mesh).spec == PartitionSpec('data')
  array = jax.device_put(np.arange(16), sharding.replicated(mesh))
  assert {s.data.shape for s in array.addressable_shards} == {(16,)}


def test_one_process_holds_every_row():
  assert sharding.local_rows(sharding.make_mesh(), 24) == list(range(24))


def test_put_batch_keeps_the_order_of_the_rows():
  mesh = sharding.make_mesh()
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.random((16, 3, 2), np.float32),
    'label': np.arange(16, dtype=np.int32),
  }
  arrays = sharding.put_batch(batch, mesh)
  assert arrays.keys() == batch.keys()
  for key, array in arrays.items():
    assert array.dtype == batch[key].dtype
    np.testing.assert_array_equal(array, batch[key])
    for i, device in enumerate(mesh.devices):
      (shard,) = (s for s in array.addressable_shards if s.device == device)
      np.testing.assert_array_equal(shard.data, batch[key][2 * i : 2 * i + 2])


@pytest.mark.parametrize('batch_size', [8, 16, 1024])
def test_batch_sizes_that_the_devices_divide(batch_size):
  sharding.check_batch_size(batch_size)


@pytest.mark.parametrize(
  ('batch_size', 'near'),
  [(12, '16'), (17, '16'), (3, '8'), (0, '8'), (-8, '8')],
)
def test_batch_sizes_that_they_do_not(batch_size, near):
  with pytest.raises(ConfigError) as e:
    sharding.check_batch_size(batch_size)
  message = str(e.value)
  assert message.startswith(f'{batch_size}: ')
  assert 'multiple of the 8 devices (1 processes)' in message
  assert message.endswith(f'e.g. {near}')


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

mesh = sharding.make_mesh()
rows = sharding.local_rows(mesh, 8)
x = np.random.default_rng(0).random((8, 3), np.float32)  # The global batch.
batch = sharding.put_batch({'x': x[rows]}, mesh)
mean = jax.jit(
  lambda x: x.mean(axis=0), out_shardings=sharding.replicated(mesh)
)(batch['x'])
try:
  sharding.check_batch_size(6)
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
