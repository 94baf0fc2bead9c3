"""Everything that can be checked before the first compile.

`check` builds a `Plan`: all parts of a run that need no device work. What is
wrong with a config is collected on the way, so that one report has it all.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from big_vision_dpn import (
  checkpoint,
  chrono,
  example_spec,
  input_pipeline,
  models,
  optim,
  pytree,
  sharding,
  tasks,
)
from big_vision_dpn import config as config_lib
from big_vision_dpn.config import ConfigError, Mistakes, check_arguments
from big_vision_dpn.datasets import core
from big_vision_dpn.evaluators import common as eval_common
from big_vision_dpn.pp import builder
from big_vision_dpn.sharding import Layout

NAN_POLICIES = {'stop': None, 'skip': None}


@dataclasses.dataclass
class Plan:
  """The parts of a run. A part that could not be built is None.

  Attributes:
    config: resolved.
    mistakes: what is wrong.
    missing: data that is not there, with the command that prepares it, to the
      fields that name it.
    parts: the data sets of the training data.
    host_shapes: of a global training batch as the hosts make it,
      jax.ShapeDtypeStructs.
    batch_shapes: of the same as the task gets it.
    total_steps: of the run.
    task: see `tasks`.
    params_shapes: of the parameters, jax.ShapeDtypeStructs.
    loaded_params: those of config.model_init, by name.
    optimizer: the optax transformation.
    schedules: multipliers of the learning rate.
    evaluators: of `config.evals`.
    metrics: the names of what they measure.
    layout: where arrays lie.
    state_shapes: of the training state, jax.ShapeDtypeStructs that have the
      shardings.
  """

  config: ml_collections.ConfigDict
  mistakes: Mistakes = dataclasses.field(default_factory=Mistakes)
  missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  parts: list[input_pipeline.Part] = dataclasses.field(default_factory=list)
  host_shapes: dict[str, jax.ShapeDtypeStruct] | None = None
  batch_shapes: dict[str, jax.ShapeDtypeStruct] | None = None
  total_steps: int | None = None
  task: Any = None
  params_shapes: Any = None
  loaded_params: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  optimizer: optax.GradientTransformation | None = None
  schedules: list[optim.Schedule] = dataclasses.field(default_factory=list)
  evaluators: list[eval_common.Entry] = dataclasses.field(default_factory=list)
  metrics: list[str] = dataclasses.field(default_factory=list)
  layout: Layout = dataclasses.field(default_factory=Layout)
  state_shapes: Any = None

  @property
  def data_name(self) -> str:
    """What messages call the training data."""
    return ' + '.join(part.source.name for part in self.parts)

  @property
  def num_examples(self) -> int | None:
    """Of the training data, all data sets together; None if not known."""
    sizes = [part.source.num_examples for part in self.parts]
    return None if None in sizes or not sizes else sum(sizes)

  def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
    """The rest of the preprocessing, traceable; see `pp.builder`."""
    if len(self.parts) > 1:  # Each may have another one: all on the host.
      return batch
    return self.parts[0].preprocess.on_device(batch)

  def steps(
    self,
    name: str,
    config: Mapping[str, Any] | None = None,
    default: int | None = None,
  ) -> int | None:
    """The duration `name` of a config, by default the main one, in steps."""
    return chrono.steps(
      name,
      self.config if config is None else config,
      batch_size=self.config.input.batch_size,
      data_size=self.num_examples,
      total_steps=self.total_steps,
      default=default,
    )

  def note_missing(self, where: str, source: core.Source) -> None:
    """Notes data that is not there, with the field `where` that names it."""
    if source.missing:
      self.missing.setdefault(source.missing, []).append(where)


def check(
  config: ml_collections.ConfigDict, workdir: str | None = None
) -> Plan:
  """Builds what a run needs and collects every mistake in its config.

  Args:
    config: as the config file gives it.
    workdir: must be new or hold a run of the same config.

  Returns:
    The plan; the run may start if it has no mistakes and misses nothing.
  """
  plan = Plan(config)
  with plan.mistakes.of(''):
    plan.config = config_lib.resolve(config)
  if plan.mistakes.messages:  # The rest would be guesswork.
    return plan
  with plan.mistakes.of('config.pp_modules'):
    builder.import_ops(plan.config.pp_modules)
  _check_layout(plan)
  with plan.mistakes.of(''):
    plan.task = tasks.make(plan.config)
  _check_input(plan)
  _check_durations(plan)
  _check_model(plan)
  _check_optimizer(plan)
  _check_state(plan)
  _check_evaluators(plan)
  if workdir:
    with plan.mistakes.of('--workdir'):
      checkpoint.check_workdir(workdir, plan.config)
  return plan


def _check_layout(plan: Plan) -> None:
  config, mesh = plan.config, plan.layout.mesh
  with plan.mistakes.of('config.mesh'):
    mesh = sharding.make_mesh(config.mesh)
  with plan.mistakes.of('config.sharding_rules'):
    plan.layout = Layout(mesh, config.sharding_rules)


def _check_input(plan: Plan) -> None:
  config = plan.config.input
  # One of weight 0 is left out, for sweeps.
  names = [n for n in config_lib.mixed_names(plan.config) if config.data[n]]
  with plan.mistakes.of('config.input.batch_size'):
    plan.layout.check_batch_size(config.batch_size)
  parts = plan.config.grad_accum_steps
  with plan.mistakes.of('config.grad_accum_steps'):
    if config.batch_size % parts:
      raise ConfigError(
        f'{parts}: expected a divisor of the batch size {config.batch_size}'
      )
    plan.layout.check_batch_size(config.batch_size // parts)
  with plan.mistakes.of('config.nan_policy'):
    config_lib.choose('nan_policy', plan.config.nan_policy, NAN_POLICIES)
  with plan.mistakes.of('config.ema_decay'):
    if not 0 <= (plan.config.ema_decay or 0) < 1:
      raise ConfigError(f'{plan.config.ema_decay}: expected 0 to below 1')
  if names:
    with plan.mistakes.of('config.input.data'):
      weights = [config.data[name] for name in names]
      input_pipeline.rows_of_parts(weights, config.batch_size)
    for name in names:
      where = f'config.input.{name}'
      _check_part(plan, where, config[name], config.data[name])
  else:
    _check_part(plan, 'config.input', config)
  if len(plan.parts) != max(1, len(names)) or not plan.task:
    return
  specs = {}
  for name, part in zip(names or [''], plan.parts, strict=True):
    with plan.mistakes.of(f'config.input{name and f".{name}"}.pp'):
      spec = example_spec.make(part.source, part.preprocess)
      example_spec.check(spec, plan.task.needs)
      specs[name] = spec
  if len(specs) == len(plan.parts):
    with plan.mistakes.of('config.input'):
      _check_alike(specs)
      plan.host_shapes = example_spec.batch_shapes(spec, config.batch_size)
      plan.batch_shapes = jax.eval_shape(plan.on_device, plan.host_shapes)
  _check_memory(plan)


def _check_part(
  plan: Plan, where: str, options: Mapping[str, Any], weight: float = 1.0
) -> None:
  """Adds one data set of the training data to the plan."""
  source = preprocess = None
  with plan.mistakes.of(f'{where}.data'):
    source = core.get(**options['data'])
    plan.note_missing(f'{where}.data', source)
  if source and options['pre_filter_fn']:
    with plan.mistakes.of(f'{where}.pre_filter_fn'):
      source = input_pipeline.filtered(source, options['pre_filter_fn'])
  with plan.mistakes.of(f'{where}.pp'):
    preprocess = builder.get_preprocess_fn(
      options['pp'], defer='batch_size' in options
    )
  if preprocess and preprocess.random and options['cache_final']:
    with plan.mistakes.of(f'{where}.cache_final'):
      raise ConfigError(
        'the pp has random ops, whose results would be the same in each epoch;'
        ' use cache_raw'
      )
  if source and preprocess:
    plan.parts.append(input_pipeline.Part(source, preprocess, options, weight))


def _check_alike(specs: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises ConfigError unless all data sets of a mix give the same features."""
  first, *others = specs
  for name in others:
    for key in sorted({*specs[first], *specs[name]}):
      here, there = specs[name].get(key), specs[first].get(key)
      if here != there:
        raise ConfigError(
          f'data sets of a mix must give the same features: {key!r} is'
          f' {here} in {name}, {there} in {first}'
        )


def host_bytes(plan: Plan) -> float:
  """What the training data takes of this host's memory, about."""
  config, total = plan.config.input, 0.0
  example = _bytes(plan.host_shapes or {}) / config.batch_size
  for part in plan.parts:
    n, options = part.source.num_examples or 0, part.options
    raw = part.source.num_bytes
    if options['cache_final']:
      total += n * example
    elif options['cache_raw'] or raw <= config.max_in_memory_gb * 1e9:
      total += raw
    elif part.source.lookup is None:
      windows = 2 * min(options['shuffle_buffer_size'], n)
      total += windows * raw / max(n, 1) / jax.process_count()
  return total


def physical_memory() -> int:
  """Bytes of memory of this machine."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _check_memory(plan: Plan) -> None:
  with plan.mistakes.of('config.input'):
    if host_bytes(plan) > physical_memory():
      raise ConfigError(
        f'the training data would take {_size(host_bytes(plan))} of this'
        f" machine's {_size(physical_memory())} of memory: lower"
        ' shuffle_buffer_size, or leave out cache_raw, cache_final or a larger'
        ' max_in_memory_gb'
      )


def _check_durations(plan: Plan) -> None:
  for name in ('total', 'log_training', 'ckpt', 'keep_ckpt'):
    with plan.mistakes.of('config'):
      steps = plan.steps(name)
      if name == 'total':
        plan.total_steps = steps
  traced = plan.config.profile_steps
  if traced and plan.total_steps is not None:
    with plan.mistakes.of('config.profile_steps'):
      if len(traced) != 2 or not 1 <= traced[0] <= traced[1]:
        raise ConfigError(f'{traced}: expected (first, last), first step 1')


def _check_model(plan: Plan) -> None:
  if not (plan.task and plan.batch_shapes):
    return
  with plan.mistakes.of(''):
    plan.task.check(plan.batch_shapes)
    with plan.mistakes.of('config.model'):
      plan.params_shapes = pytree.eval_shape(
        plan.task.init, jax.random.key(0), plan.batch_shapes
      )
  if plan.params_shapes and plan.config.model_init:
    with plan.mistakes.of('config.model_init'):
      _load_params(plan)


def _load_params(plan: Plan) -> None:
  config = plan.config
  load = models.module(config.model_name).load
  check_arguments(
    'load (config.model_load)',
    load,
    config.model_load,
    reserved=('init_params', 'init_file', 'model_cfg', 'image_size'),
  )
  loaded = load(
    plan.params_shapes,
    config.model_init,
    config.model,
    image_size=plan.batch_shapes['image'].shape[1:3],
    **config.model_load,
  )
  # What load() leaves as it was is still a shape: init makes it.
  plan.loaded_params = {
    name: array
    for name, array in pytree.flatten_with_names(loaded).items()
    if not isinstance(array, jax.ShapeDtypeStruct)
  }


def _check_optimizer(plan: Plan) -> None:
  if plan.total_steps is None:
    return
  sizes = {
    'total_steps': plan.total_steps,
    'batch_size': plan.config.input.batch_size,
    'data_size': plan.num_examples,
  }
  with plan.mistakes.of(''):
    optim.check(plan.config, **sizes)
    if plan.params_shapes:
      plan.optimizer, plan.schedules = optim.make(
        plan.config, plan.params_shapes, **sizes
      )


def _check_state(plan: Plan) -> None:
  if not plan.optimizer:
    return
  state = {
    'params': plan.params_shapes,
    'opt': jax.eval_shape(plan.optimizer.init, plan.params_shapes),
  }
  if plan.config.ema_decay:
    state['ema'] = plan.params_shapes
  if plan.config.nan_policy == 'skip':
    state['skipped'] = jax.ShapeDtypeStruct((), np.int32)
  with plan.mistakes.of(''):
    shardings = sharding.infer_state(
      state, plan.config.sharding_strategy, plan.layout.mesh
    )
    plan.state_shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      shardings,
    )


def _check_evaluators(plan: Plan) -> None:
  for name, spec in plan.config.evals.items():
    with plan.mistakes.of(f'config.evals.{name}'):
      entry = eval_common.from_config(
        name,
        spec,
        plan.task.predict_fns if plan.task else None,
        plan.steps,
        plan.config.input,
        plan.layout,
      )
      for source in entry.evaluator.sources():
        plan.note_missing(f'config.evals.{name}', source)
      if plan.params_shapes:
        names = entry.evaluator.check(plan.params_shapes)
        prefixes = ('', 'ema/') if plan.config.ema_decay else ('',)
        plan.metrics += [p + entry.prefix + n for p in prefixes for n in names]
      if entry.prefix in {e.prefix for e in plan.evaluators}:
        raise ConfigError(f'prefix {entry.prefix!r} is that of another one')
      plan.evaluators.append(entry)


def report_mistakes(plans: Iterable[Plan], *, data_needed: bool) -> str:
  """What stops the runs, each thing once, as text; empty if nothing does."""
  problems = {}
  for plan in plans:
    problems |= dict.fromkeys(plan.mistakes.messages)
    if data_needed:
      problems |= dict.fromkeys(_missing_lines(plan))
  if not problems:
    return ''
  lines = [f'{len(problems)} to mend before this config can run:']
  for i, problem in enumerate(problems, 1):
    lines.append(f'{i}. ' + problem.replace('\n', '\n   '))
  return '\n'.join(lines)


def _missing_lines(plan: Plan) -> list[str]:
  return [f'{", ".join(w)}: {what}' for what, w in plan.missing.items()]


def _bytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)


def _size(num_bytes: float) -> str:
  for unit in ('B', 'kB', 'MB'):
    if num_bytes < 1000:
      return f'{num_bytes:.3g} {unit}'
    num_bytes /= 1000
  return f'{num_bytes:,.3g} GB'


def summary(plan: Plan, flops: float) -> str:
  """What the run will be, for `--dry_run`.

  Args:
    plan: without mistakes.
    flops: floating-point operations of one step, over all devices.
  """
  rows = [
    *_summarize_model(plan),
    *_summarize_course(plan),
    ('FLOPs a step', f'{flops:.3e}'),
    *_summarize_devices(plan),
  ]
  for entry in plan.evaluators:
    names = ', '.join(s.name for s in entry.evaluator.sources())
    rows.append(('evaluator', f'{entry.name}: {names}, every {entry.every:,}'))
  rows += [('not prepared', text) for text in _missing_lines(plan)]
  indent = '\n' + ' ' * 16
  return '\n'.join(f'{k:<15} ' + v.replace('\n', indent) for k, v in rows)


def _summarize_model(plan: Plan) -> list[tuple[str, str]]:
  config = plan.config
  num_params = sum(x.size for x in jax.tree.leaves(plan.params_shapes))
  fields = ', '.join(f'{k}={v}' for k, v in config.model.items())
  return [
    ('task', config.task),
    ('model', f'{config.model_name}: {fields}'),
    ('parameters', f'{num_params:,}'),
  ]


def _summarize_course(plan: Plan) -> list[tuple[str, str]]:
  config, total = plan.config, plan.total_steps
  batch_size, n = config.input.batch_size, plan.num_examples
  at = [round(total * quarter / 4) for quarter in range(5)]
  rates = [
    ', '.join(f'{config.lr * float(s(step)):.3g}' for step in at)
    for s in plan.schedules
  ]
  size = f'{n:,} examples' if n else 'size not known without the data'
  return [
    ('data', f'{plan.data_name}, {size}'),
    ('steps', f'{total:,} of {batch_size:,} examples'),
    ('epochs', f'{total * batch_size / n:.4g}' if n else '?'),
    *(('learning rate', f'{r} at steps {at}') for r in rates),
  ]


def _summarize_devices(plan: Plan) -> list[tuple[str, str]]:
  devices = jax.devices()
  opt = jax.eval_shape(plan.optimizer.init, plan.params_shapes)
  params = _size(_bytes(plan.params_shapes))
  batch = _size(_bytes(plan.host_shapes) / len(devices))
  return [
    ('devices', f'{len(devices)} ({devices[0].device_kind})'),
    (
      'bytes a device',
      f'parameters {params}, optimizer {_size(_bytes(opt))}, gradients'
      f' {params}, batch {batch}; activations not counted',
    ),
    ('host memory', f'{_size(host_bytes(plan))} for the training data'),
  ]
