"""Devices: start-up of several processes, the mesh, and where arrays lie."""

import ast
import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from big_vision_dpn import pytree
from big_vision_dpn.config import ConfigError, check_arguments, choose

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

# The mesh axes over which one dimension of an array is split.
Axes = str | tuple[str, ...] | None
Spec = tuple[Axes, ...]


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


def make_mesh(
  axes: Sequence[tuple[str, int]] = (('data', -1),),
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The devices of all processes, along named axes.

  Args:
    axes: (name, size) pairs; one size may be -1, for the rest.
    devices: None for all.

  Raises:
    ConfigError: the sizes are not those of a mesh of so many devices.
  """
  devices = jax.devices() if devices is None else devices
  pairs = [tuple(pair) for pair in axes if isinstance(pair, list | tuple)]
  if not pairs or len(pairs) != len(axes) or not all(
    len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], int)
    for p in pairs
  ):  # fmt: skip
    raise ConfigError(f'{axes!r}: expected pairs such as ("data", -1)')
  names, sizes = zip(*pairs, strict=True)
  known = math.prod(size for size in sizes if size != -1)
  rest = len(devices) // known if known > 0 else 0
  sizes = tuple(rest if size == -1 else size for size in sizes)
  if (
    len(set(names)) < len(names)
    or min(sizes) < 1
    or math.prod(sizes) != len(devices)
  ):
    raise ConfigError(
      f'{pairs}: no mesh of {len(devices)} devices; the axes have different'
      f' names, the product of their sizes is {len(devices)}, and one size may'
      ' be -1, for the rest'
    )
  return jax.make_mesh(
    sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """How arrays lie on the devices.

  Attributes:
    mesh: the devices.
    rules: (logical axis of an activation, mesh axes) pairs, as flax has them;
      'act_batch' is that of the examples. The others that the models know are
      'act_len', 'act_emb', 'act_heads' and 'act_mlp'.
  """

  mesh: Mesh = dataclasses.field(default_factory=make_mesh)
  rules: Sequence[tuple[str, Axes]] = (('act_batch', 'data'),)

  def __post_init__(self):
    for rule in self.rules:
      if not isinstance(rule, list | tuple) or len(rule) != 2:
        raise ConfigError(f'{rule!r}: expected (activation axis, mesh axis)')
      for axis in _names(rule[1]):
        choose('axis of the mesh', axis, self.mesh.shape)

  @property
  def replicated(self) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def over_batch(self) -> NamedSharding:
    """Splits the first dimension, the examples."""
    axes = dict(self.rules).get('act_batch')
    return NamedSharding(self.mesh, PartitionSpec(axes))

  @contextlib.contextmanager
  def activated(self) -> Iterator[None]:
    """Within it, what is traced has its activations' axes from here."""
    rules = [(name, axes) for name, axes in self.rules]
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(rules):
      yield

  def check_batch_size(self, batch_size: int) -> None:
    """Raises ConfigError unless the devices divide the batch."""
    axes = _names(self.over_batch.spec[0])
    parts = math.prod(self.mesh.shape[axis] for axis in axes)
    if batch_size < 1 or batch_size % parts:
      near = max(parts, round(batch_size / parts) * parts)
      raise ConfigError(
        f'{batch_size}: expected a multiple of the {parts} devices'
        f' ({jax.process_count()} processes) over which a batch is split, e.g.'
        f' {near}'
      )

  def local_rows(self, batch_size: int) -> list[int]:
    """The rows of a global batch that this process holds, ascending."""
    slices = self.over_batch.addressable_devices_indices_map((batch_size,))
    return sorted({r for (s,) in slices.values() for r in range(batch_size)[s]})

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch on the devices, out of this process's rows of it.

    Features of dtype object, which no device can hold, are left out.
    """
    return {
      key: jax.make_array_from_process_local_data(self.over_batch, value)
      for key, value in batch.items()
      if value.dtype != object
    }


def _names(axes: Axes) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """x, laid out as the active Layout's rules say for these logical axes."""
  return nn.with_logical_constraint(x, axes)


# What a strategy is made of. Each is a function of (spec, mesh, name, x), the
# mesh axes over which the dimensions of parameter `name` are split so far, to
# the same with its own.


def _replicate() -> Callable:
  return lambda spec, mesh, name, x: spec


def _fsdp(axis: Axes, min_size_to_shard_mb: float = 4) -> Callable:
  """Splits the largest dimension that the axis divides and nothing has yet."""

  def extend(spec: Spec, mesh: Mesh, name: str, x: Any) -> Spec:
    if math.prod(x.shape) * x.dtype.itemsize <= min_size_to_shard_mb * 2**20:
      return spec
    parts = math.prod(mesh.shape[a] for a in _names(axis))
    for i in np.argsort(x.shape, stable=True)[::-1]:
      if x.shape[i] % parts == 0 and spec[i] is None:
        return (*spec[:i], axis, *spec[i + 1 :])
    return spec

  return extend


def _shard_dim(
  axis: Axes, dim: int, ignore_ndim_error: bool = False
) -> Callable:
  """Splits dimension `dim`, from the end if negative."""

  def extend(spec: Spec, mesh: Mesh, name: str, x: Any) -> Spec:
    if not -len(spec) <= dim < len(spec):
      if ignore_ndim_error:
        return spec
      raise ConfigError(f'{name} {list(x.shape)} has no dimension {dim}')
    i, parts = dim % len(spec), math.prod(mesh.shape[a] for a in _names(axis))
    if spec[i] is not None or x.shape[i] % parts:
      raise ConfigError(
        f'{name} {list(x.shape)}: dimension {dim} cannot be split over {axis!r}'
        f' ({parts} devices)' + (f', as {spec[i]!r} has it' if spec[i] else '')
      )
    return (*spec[:i], axis, *spec[i + 1 :])

  return extend


# What Megatron's tensor parallelism splits: attention by heads, the MLP by its
# hidden units. Dimensions from the end, as a scan's come first.
_TENSOR_PARALLEL = {
  r'.*/(query|key|value)/(kernel|bias)': -2,
  r'.*/out/kernel': -3,
  r'.*/HeadScale_0/scale': -2,
  r'.*/MultiHeadDotProductAttention_0/LayerNorm_0/(scale|bias)': -2,
  r'.*/MlpBlock_0/Dense_0/(kernel|bias)': -1,
  r'.*/MlpBlock_0/LayerNorm_0/(scale|bias)': -1,
  r'.*/MlpBlock_0/Dense_1/kernel': -2,
}


def _tensor_parallel(axis: Axes) -> Callable:
  """Splits attention by heads and MLPs by hidden units.

  Source: Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053.
  """

  def extend(spec: Spec, mesh: Mesh, name: str, x: Any) -> Spec:
    for regex, dim in _TENSOR_PARALLEL.items():
      if re.fullmatch(regex, name):
        return _shard_dim(axis, dim)(spec, mesh, name, x)
    return spec

  return extend


STRATEGIES = {
  'replicate': _replicate,
  'fsdp': _fsdp,
  'shard_dim': _shard_dim,
  'tensor_parallel': _tensor_parallel,
}


def _parse_strategy(text: str, mesh: Mesh) -> list[Callable]:
  """'fsdp(axis="data")|…' as functions, see STRATEGIES."""
  functions = []
  for part in text.split('|'):
    try:
      node = ast.parse(part.strip(), mode='eval').body
      call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
      name = call.func.id
      args = [ast.literal_eval(a) for a in call.args]
      kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as e:
      raise ConfigError(
        f'{part!r}: expected a strategy such as fsdp(axis="data")'
      ) from e
    make = choose('strategy', name, STRATEGIES)
    check_arguments(f'strategy {name}', make, kwargs)
    for axis in _names(kwargs.get('axis', args[0] if args else None)):
      choose('axis of the mesh', axis, mesh.shape)
    try:
      functions.append(make(*args, **kwargs))
    except TypeError as e:
      raise ConfigError(f'{part!r}: {e}') from e
  return functions


def infer_state(
  state: Mapping[str, Any],
  strategy: Sequence[tuple[str, str]],
  mesh: Mesh,
) -> dict[str, Any]:
  """Where the arrays of a training state lie.

  What belongs to a parameter, as the optimizer's moments do, lies where it
  does, or, if its shape is another one, where the same strategy puts that.

  Args:
    state: trees of arrays or shapes; `params`, and others whose leaves' names
      end with a parameter's.
    strategy: (regex of parameter names, strategies joined by "|") pairs. The
      first that matches counts; a parameter that none does is replicated.
    mesh: the devices.

  Returns:
    Trees of NamedShardings like `state`.

  Raises:
    ConfigError: a pattern that matches nothing, a strategy that does not exist
      or does not go with a parameter.
  """
  texts = pytree.first_match(
    'sharding_strategy', state['params'], strategy, default='replicate'
  )
  parsed = {text: _parse_strategy(text, mesh) for text in texts.values()}
  params = pytree.flatten_with_names(state['params'])

  def spec(owner: str, x: Any) -> Spec:
    result = (None,) * len(x.shape)
    for extend in parsed[texts[owner]]:
      result = extend(result, mesh, owner, x)
    return result

  def place(name: str, x: Any) -> NamedSharding:
    owner = _owner(name, params)
    if not owner:
      return NamedSharding(mesh, PartitionSpec())
    try:
      return NamedSharding(mesh, PartitionSpec(*spec(owner, x)))
    except ConfigError:
      if x.shape == params[owner].shape:
        raise
      # A factored moment lacks the dimension that is split.
      return NamedSharding(mesh, PartitionSpec())

  return pytree.map_with_names(place, state)


def _owner(name: str, params: Mapping[str, Any]) -> str | None:
  """The parameter whose name is the end of this one."""
  parts = name.split('/')
  ends = ('/'.join(parts[i:]) for i in range(1, len(parts)))
  return next((end for end in ends if end in params), None)
