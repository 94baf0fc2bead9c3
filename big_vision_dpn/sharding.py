"""Devices: start-up of several processes, the mesh, and where arrays lie."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from big_vision_dpn.config import ConfigError

# One of these is set where a job has several processes. jax.distributed knows
# how to read the addresses from them.
_CLUSTER_MARKERS = (
  'JAX_COORDINATOR_ADDRESS',
  'COORDINATOR_ADDRESS',
  'OMPI_MCA_orte_hnp_uri',
  'SLURM_STEP_NODELIST',
  'TPU_WORKER_HOSTNAMES',
  'MEGASCALE_COORDINATOR_ADDRESS',
)


def initialize_processes() -> None:
  """Joins the processes of a job, where a cluster's environment is found.

  Where there is no cluster that jax knows, JAX_COORDINATOR_ADDRESS (host:port
  of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say the same.

  Must run before the first use of a device. Its failure is not caught: a job
  whose processes train apart is worse than one that stops.
  """
  if any(os.environ.get(marker) for marker in _CLUSTER_MARKERS):
    # Of the three, jax itself reads the address alone.
    jax.distributed.initialize(
      num_processes=_number_in_env('JAX_NUM_PROCESSES'),
      process_id=_number_in_env('JAX_PROCESS_ID'),
    )


def _number_in_env(name: str) -> int | None:
  text = os.environ.get(name)
  return int(text) if text else None


def make_mesh() -> Mesh:
  """All devices of all processes along one axis, "data"."""
  return jax.make_mesh(
    (jax.device_count(),), ('data',), axis_types=(AxisType.Auto,)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Splits the first dimension, the examples, over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch_size(batch_size: int) -> None:
  """Raises ConfigError unless the devices divide the batch."""
  devices, hosts = jax.device_count(), jax.process_count()
  if batch_size < 1 or batch_size % devices:
    near = max(devices, round(batch_size / devices) * devices)
    raise ConfigError(
      f'{batch_size}: expected a multiple of the {devices} devices'
      f' ({hosts} processes), e.g. {near}'
    )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of a global batch that this process holds, ascending."""
  slices = over_batch(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({r for (s,) in slices.values() for r in range(batch_size)[s]})


def put_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """The global batch on the devices, out of this process's rows of it.

  Features of dtype object, which no device can hold, are left out.
  """
  sharding = over_batch(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
    if value.dtype != object
  }
