"""What all evaluators share: the spec in the config, batches, and sums."""

import abc
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_dpn import example_spec, input_pipeline, pytree
from big_vision_dpn.config import (
  DURATION_UNITS,
  ConfigError,
  Mistakes,
  check_arguments,
  choose,
)
from big_vision_dpn.datasets import core
from big_vision_dpn.pp import builder
from big_vision_dpn.sharding import Layout

EVALUATORS = {
  'classification': 'big_vision_dpn.evaluators.classification',
  'mean': 'big_vision_dpn.evaluators.mean',
}

# Fields of an evaluator's spec that say how its split is read.
SPLIT_OPTIONS = ('cache_raw', 'cache_final', 'skip_errors')

# Fields of an evaluator's spec that are not arguments of its class.
_GENERAL = ('type', 'pred', 'prefix', *(f'log_{u}' for u in DURATION_UNITS))


@dataclasses.dataclass(frozen=True)
class Entry:
  """An evaluator of a config: what runs, how often, and its metrics' prefix."""

  name: str
  evaluator: Any
  every: int
  prefix: str


class Split:
  """A split with its preprocessing, iterated as batches on the devices."""

  def __init__(
    self,
    data: Mapping[str, Any],
    pp_fn: str,
    batch_size: int,
    input_config: Mapping[str, Any],
  ):
    self.batch_size, self._input_config = batch_size, input_config
    self._start = None
    mistakes = Mistakes()
    with mistakes.of('data'):
      self.source = core.get(**data)
    with mistakes.of('pp_fn'):
      self._preprocess = builder.get_preprocess_fn(pp_fn)
    mistakes.check()
    self.spec = example_spec.make(self.source, self._preprocess)

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, with its `_mask`."""
    mask = jax.ShapeDtypeStruct((self.batch_size,), np.float32)
    shapes = example_spec.batch_shapes(self.spec, self.batch_size)
    return {**shapes, '_mask': mask}

  def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of the preprocessing, traceable; see `pp.builder`."""
    return self._preprocess.on_device(batch)

  def batches(
    self, layout: Layout
  ) -> Iterator[tuple[dict[str, jax.Array], dict[str, np.ndarray]]]:
    """Each example once; `_mask` is 0 for the padding of the last batches.

    Yields:
      A global batch on the devices; and of this process's rows of it what
      stays on the host: strings and features of varying length.
    """
    if self._start is None:
      self._start = input_pipeline.inference(
        self.source,
        self._preprocess,
        self._input_config,
        batch_size=self.batch_size,
        rows=layout.local_rows(self.batch_size),
        **{k: self._input_config.get(k, False) for k in SPLIT_OPTIONS},
      )
    for batch in self._start():
      on_host = {k: v for k, v in batch.items() if v.dtype == object}
      yield layout.put_batch(batch), on_host


class MeanEvaluator(abc.ABC):
  """Base of evaluators whose metrics are weighted means over a split.

  A subclass gives `per_example(params, batch)`: a dict of metrics, each (n,)
  float, and the weights of the examples, (n,) float. The result is exact on
  any number of devices and for any batch size: padding weighs nothing.
  """

  needs: tuple[str, ...] = ('image',)

  def __init__(
    self,
    predict_fn: Callable,
    *,
    data: Mapping[str, Any],
    pp_fn: str = '',
    batch_size: int,
    input_config: Mapping[str, Any],
  ):
    self.predict_fn = predict_fn
    self.split = Split(data, pp_fn, batch_size, input_config)
    mistakes = Mistakes()
    with mistakes.of('pp_fn'):
      example_spec.check(self.split.spec, self.needs)
    mistakes.check()
    self._sums = jax.jit(self._sum)

  @abc.abstractmethod
  def per_example(self, params: Any, batch: Any) -> tuple[dict, jax.Array]:
    """Metrics by name, (n,) float each, and weights, (n,) float."""

  def _sum(self, params: Any, batch: Any) -> tuple[dict, jax.Array]:
    values, weights = self.per_example(params, self.split.on_device(batch))
    for name, value in values.items():
      if value.shape != weights.shape:
        raise ConfigError(
          f'{name!r} has the shape {list(value.shape)}; expected one value an'
          f' example, {list(weights.shape)}'
        )
    # An example that does not count may well have a loss of nan.
    count = weights > 0
    weighted = lambda v: jnp.sum(jnp.where(count, v * weights, 0.0))
    return jax.tree.map(weighted, values), jnp.sum(weights)

  def sources(self) -> list[core.Source]:
    """The data that the evaluator reads."""
    return [self.split.source]

  def check(self, params: Any) -> list[str]:
    """Traces the evaluator on shapes of parameters; reads no data.

    Returns:
      The names of its metrics.

    Raises:
      ConfigError: the predict function cannot take the batches.
    """
    batch = self.split.batch_shapes()
    sums, _ = pytree.eval_shape(self._sum, params, batch)
    return list(sums)

  def run(self, params: Any, layout: Layout) -> Iterator[tuple[str, float]]:
    """Yields (name of the metric, value) over the whole split."""
    sums = []
    for batch, _ in self.split.batches(layout):
      sums.append(self._sums(params, batch))
      # Further ahead than one step, batches would fill the device.
      jax.block_until_ready(sums[-2:-1])
    totals, weight = jax.tree.map(
      lambda *x: float(np.sum(x, dtype=np.float64)), *jax.device_get(sums)
    )
    for name, total in totals.items():
      yield name, total / weight if weight else float('nan')


def from_config(
  name: str,
  spec: Mapping[str, Any],
  predict_fns: Mapping[str, Callable] | None,
  get_steps: Callable[[str, Mapping[str, Any]], int | None],
  input_config: Mapping[str, Any],
  layout: Layout,
) -> Entry:
  """Builds one evaluator of `config.evals`, as big_vision's specs say.

  Args:
    name: its key in `config.evals`.
    spec: `type` (default: the name), `data`, `pp_fn`, `log_steps` (or another
      unit), `pred` (default "predict"), `prefix` (default "NAME/"),
      `batch_size` (default: of training), `cache_raw`, `cache_final` and
      `skip_errors` (see `input_pipeline.inference`), and the evaluator's own
      arguments.
    predict_fns: of the task; None if it is not known, for a check.
    get_steps: (duration's name, spec) -> steps.
    input_config: the resolved `config.input`.
    layout: of the batches.

  Raises:
    ConfigError: whatever is wrong with the spec.
  """
  spec = {'type': name, 'pred': 'predict', 'prefix': f'{name}/', **spec}
  mistakes = Mistakes()
  with mistakes.of('type'):
    module = choose('evaluator', spec['type'], EVALUATORS)
  with mistakes.of('pred'):
    predict_fn = None
    if predict_fns is not None:
      predict_fn = choose('predict function', spec['pred'], predict_fns)
  with mistakes.of('log_steps'):
    every = get_steps('log', spec)
    if not every:
      raise ConfigError('missing (or log_epochs, log_percent, log_examples)')
  mistakes.check()

  arguments = {
    'batch_size': input_config['batch_size'],
    **{k: v for k, v in spec.items() if k not in _GENERAL + SPLIT_OPTIONS},
  }
  input_config = {
    **input_config,
    **{k: spec.get(k, False) for k in SPLIT_OPTIONS},
  }
  evaluator = importlib.import_module(module).Evaluator
  check_arguments(
    f'evaluator {spec["type"]}',
    evaluator,
    arguments,
    reserved=('self', 'predict_fn', 'input_config'),
  )
  if 'data' not in arguments:
    raise ConfigError('data is missing: dict(name=…, split=…)')
  with mistakes.of(''):
    made = evaluator(predict_fn, input_config=input_config, **arguments)
  with mistakes.of('batch_size'):
    layout.check_batch_size(arguments['batch_size'])
  mistakes.check()
  return Entry(name, made, every, spec['prefix'])
