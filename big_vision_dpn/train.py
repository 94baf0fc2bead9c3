r"""Trains a model as a config says.

    python -m big_vision_dpn.train \
      --config configs/proj/dpn/quickstart.py --workdir workdirs/quickstart

The same command again goes on where the run stopped, exactly. Arguments of a
config stand behind a colon, fields are set with --config.FIELD:

    --config configs/proj/dpn/cifar10.py:patch_norm=none,seed=1 --config.lr=3e-4

`--dry_run` checks everything and tells what the run would be, without data.
SIGTERM saves and ends with code 42. The fields of a config: `python -m
big_vision_dpn.config`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from einops import rearrange
from ml_collections import config_flags

from big_vision_dpn import (
  comparison,
  input_pipeline,
  optim,
  preflight,
  pytree,
  sharding,
  writers,
)
from big_vision_dpn.checkpoint import Checkpointer, write_config
from big_vision_dpn.chrono import Chrono, StepTrace, itstime
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets.core import DataError
from big_vision_dpn.evaluators.common import Entry
from big_vision_dpn.preemption import Preemption
from big_vision_dpn.workdir_lock import locked
from big_vision_dpn.writers import note

# Exit codes.
DAMAGED_DATA = 1
USER_MISTAKE = 2
NOT_FINITE = 3
PREEMPTED = 42


def make_update_fn(plan: preflight.Plan) -> Callable:
  """The training step: (state, batch, step) -> (state, measurements).

  `state` is a dict of `params`, `opt` and, with config.ema_decay, `ema`; `step`
  the number of updates done. Randomness is a function of (config.seed, step)
  alone.
  """
  config, task, optimizer = plan.config, plan.task, plan.optimizer
  is_frozen = optim.frozen(config, plan.params_shapes)

  def update_fn(state, batch, step):
    # Threefry, jax's default, gives the same numbers on any mesh, and each
    # device draws its own part; with rbg each would draw those of all.
    rng = jax.random.fold_in(jax.random.key(config.seed), step)
    rng_augment, rng_loss = jax.random.split(rng)
    params = state['params']
    batch = task.augment(plan.on_device(batch), rng_augment)
    measurements, grads = accumulated(
      task.loss, params, batch, rng_loss, config.grad_accum_steps
    )
    updates, opt = optimizer.update(grads, state['opt'], params)
    params = optax.apply_updates(params, updates)
    grads = pytree.flatten_with_names(grads)
    trained = {k: g for k, g in grads.items() if not is_frozen[k]}
    measurements |= {
      'l2_grads': pytree.l2_norm(trained),
      'l2_params': pytree.l2_norm(params),
      'l2_updates': pytree.l2_norm(updates),
    }
    new_state = {**state, 'params': params, 'opt': opt}
    if config.ema_decay:
      new_state['ema'] = optax.incremental_update(
        params, state['ema'], 1 - config.ema_decay
      )
    finite = is_finite(measurements)
    if config.nan_policy == 'skip':
      choose = lambda new, old: jnp.where(finite, new, old)
      new_state = jax.tree.map(choose, new_state, state)
      new_state['skipped'] = state['skipped'] + ~finite
      measurements['skipped_updates'] = new_state['skipped']
    return new_state, measurements

  return update_fn


def is_finite(measurements: Mapping[str, Any]) -> Any:
  """Whether loss and gradients of a step are."""
  values = measurements['training_loss'] + measurements['l2_grads']
  return jnp.isfinite(values)


def accumulated(
  loss_fn: Callable,
  params: Any,
  batch: dict[str, jax.Array],
  rng: jax.Array,
  steps: int,
) -> tuple[dict[str, jax.Array], Any]:
  """Measurements and gradients of a batch, in `steps` parts of it.

  All are means over examples: they are those of the whole batch, to rounding.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  if steps == 1:
    grads, measurements = gradient(params, batch, rng)
    return measurements, grads
  # Every part has rows of all devices, which keep theirs.
  split = lambda x: rearrange(x, '(b steps) ... -> steps b ...', steps=steps)

  def add(total, part):
    i, batch = part
    grads, measurements = gradient(params, batch, jax.random.fold_in(rng, i))
    return jax.tree.map(jnp.add, total, (measurements, grads)), None

  parts = jnp.arange(steps), jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(lambda p: gradient(params, p[1], rng)[::-1], first),
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / steps, total)


def check_update(plan: preflight.Plan) -> None:
  """Traces the training step, so that what fails there fails first here."""
  with plan.mistakes.of('the training step'):
    update_fn = make_update_fn(plan)
    with plan.layout.activated():
      pytree.eval_shape(
        lambda s, b: update_fn(s, b, 0), plan.state_shapes, plan.host_shapes
      )


def state_shardings(plan: preflight.Plan) -> Any:
  """Where the arrays of the training state lie."""
  return jax.tree.map(lambda x: x.sharding, plan.state_shapes)


def init_state(plan: preflight.Plan) -> Any:
  """The state before the first step, made where it lies."""

  @functools.partial(jax.jit, out_shardings=state_shardings(plan))
  def init(rng, loaded):
    batch = jax.tree.map(
      lambda s: jnp.zeros((1, *s.shape[1:]), s.dtype), plan.batch_shapes
    )
    params = plan.task.init(rng, batch)
    params = pytree.map_with_names(lambda k, x: loaded.get(k, x), params)
    state = {'params': params, 'opt': plan.optimizer.init(params)}
    if plan.config.ema_decay:
      state['ema'] = params
    if plan.config.nan_policy == 'skip':
      state['skipped'] = jnp.zeros((), jnp.int32)
    return state

  return init(jax.random.key(plan.config.seed), plan.loaded_params)


def restore_or_init(
  plan: preflight.Plan, checkpointer: Checkpointer | None
) -> tuple[int, Any, dict[str, Any]]:
  """Steps done, state, and what else the newest checkpoint has, if any."""
  restored = None
  if checkpointer:
    restored = checkpointer.restore_newest(plan.state_shapes)
  return restored or (0, init_state(plan), {})


def flops_a_step(plan: preflight.Plan) -> float:
  """Floating-point operations of one step, by XLA's count; compiles nothing."""
  with plan.layout.activated():
    lowered = jax.jit(make_update_fn(plan)).lower(
      plan.state_shapes, plan.host_shapes, 0
    )
  return lowered.cost_analysis()['flops']


def batches_from(
  plan: preflight.Plan, start_step: int
) -> Iterator[dict[str, jax.Array]]:
  """Training batches on the devices, some ahead of their use."""
  config = plan.config
  batches = input_pipeline.training(
    plan.parts,
    config.input,
    seed=config.seed,
    start_step=start_step,
    rows=plan.layout.local_rows(config.input.batch_size),
  )
  ahead = []
  for batch in batches:
    ahead.append(plan.layout.put_batch(batch))
    if len(ahead) > config.input.prefetch:
      yield ahead.pop(0)


def train(plan: preflight.Plan, name: str, workdir: str | None) -> bool:
  """Trains, or goes on training, until the last step.

  Args:
    plan: without mistakes, its data there.
    name: of the run, on the progress lines.
    workdir: of checkpoints and metrics; None saves nothing.

  Returns:
    Whether the run has come to its end. False if SIGTERM ended it before, with
    a checkpoint.
  """
  with (
    plan.layout.activated(),
    Preemption() as preemption,
    contextlib.ExitStack() as at_end,
  ):
    return _train(plan, name, workdir, preemption, at_end)


def _train(
  plan: preflight.Plan,
  name: str,
  workdir: str | None,
  preemption: Preemption,
  at_end: contextlib.ExitStack,
) -> bool:
  config, total_steps = plan.config, plan.total_steps

  checkpointer, keep_every = None, plan.steps('keep_ckpt')
  if workdir:
    write_config(workdir, config)
    checkpointer = Checkpointer(workdir, keep_every)
    at_end.enter_context(contextlib.closing(checkpointer))
  first_step, state, extra = restore_or_init(plan, checkpointer)
  note(
    f'{name}: {total_steps - first_step:,} of {total_steps:,} steps to go,'
    f' {config.input.batch_size:,} examples each of {plan.data_name}, on'
    f' {jax.device_count()} {jax.devices()[0].platform}; the first one compiles'
  )

  chrono = Chrono(
    first_step=first_step,
    total_steps=total_steps,
    batch_size=config.input.batch_size,
    devices=jax.device_count(),
  )
  chrono.restore(extra.get('chrono'))
  trace = StepTrace(config.profile_steps, workdir)
  writer = writers.make(workdir, first_step)
  progress = writers.Progress(name, first_step, total_steps)
  for closed in (trace, writer, progress):
    at_end.enter_context(contextlib.closing(closed))

  update_fn = jax.jit(
    make_update_fn(plan),
    donate_argnums=0,
    out_shardings=(state_shardings(plan), plan.layout.replicated),
  )
  batches = batches_from(plan, first_step)
  log_every, ckpt_every = plan.steps('log_training'), plan.steps('ckpt')

  measurements, preempted = {}, False
  for step in range(first_step + 1, total_steps + 1):
    trace.begin(step)
    last = measurements
    state, measurements = update_fn(state, next(batches), step - 1)
    # This waits, as further ahead batches would fill the device.
    check_finite(plan, last, step - 1, workdir)
    trace.end(step, state)
    progress.step()
    metrics = {}

    if itstime(step, log_every, total_steps, first=True):
      metrics |= jax.device_get(measurements) | chrono.tick(step)
      metrics |= schedule_metrics(plan, step)
      progress.report(step, metrics, chrono.seconds_left(step))

    for entry in plan.evaluators:
      if itstime(step, entry.every, total_steps):
        jax.block_until_ready(state)
        with chrono.paused():
          results = evaluate(entry, state, plan.layout)
        progress.report_results(step, results)
        metrics |= results

    preempted = preemption.requested(step) and step < total_steps
    due = itstime(step, ckpt_every, total_steps) or preempted
    due = due or (keep_every and step % keep_every == 0)
    if due or metrics:
      check_finite(plan, measurements, step, workdir)
    # Metrics before the checkpoint: a run that goes on from it lacks none.
    if metrics:
      writer.write(step, metrics)
    if checkpointer and due:
      jax.block_until_ready(state)
      with chrono.paused():
        checkpointer.save(step, state, {'chrono': chrono.state()})
    if preempted:
      saved = 'saved; the same command goes on' if workdir else 'nothing saved'
      note(f'{name}: told to end, behind step {step}: {saved}')
      break

  return not preempted


class NotFinite(RuntimeError):
  """The loss or the gradients of a step are not finite."""


def check_finite(
  plan: preflight.Plan,
  measurements: Mapping[str, Any],
  step: int,
  workdir: str | None,
) -> None:
  """Raises NotFinite, and writes WORKDIR/not_finite.json, unless they are.

  Not with nan_policy 'skip', which goes on without the update.
  """
  jax.block_until_ready(measurements)
  if plan.config.nan_policy == 'skip' or not measurements:
    return
  if is_finite(measurements):
    return
  values = {k: str(v) for k, v in jax.device_get(measurements).items()}
  told = f'step {step} is not finite: loss {values["training_loss"]}'
  if workdir and jax.process_index() == 0:
    examples = input_pipeline.examples_of_step(
      plan.parts,
      plan.config.input,
      seed=plan.config.seed,
      step=step - 1,
      rows=range(plan.config.input.batch_size),
    )
    record = {'step': step, 'measurements': values, 'examples': examples}
    path = writers.write_json(workdir, 'not_finite.json', record)
    told += f'; its examples are in {path}'
  raise NotFinite(
    f'{told}. The checkpoints before it are good. Lower lr, clip gradients by'
    " grad_clip_norm, or leave such updates out by nan_policy='skip'"
  )


def schedule_metrics(plan: preflight.Plan, step: int) -> dict[str, float]:
  """Learning rate and schedules of the update that led to `step`; epochs."""
  metrics = {
    f'global_schedule{i or ""}': float(schedule(step - 1))
    for i, schedule in enumerate(plan.schedules)
  }
  examples = step * plan.config.input.batch_size
  return metrics | {
    'lr': plan.config.lr * metrics['global_schedule'],
    'epoch': examples / plan.num_examples,
  }


def evaluate(
  entry: Entry, state: Mapping[str, Any], layout: sharding.Layout
) -> dict[str, float]:
  """Metrics of one evaluator, by their full names: of the EMA with `ema/`."""
  return {
    prefix + entry.prefix + key: value
    for name, prefix in (('params', ''), ('ema', 'ema/'))
    if name in state
    for key, value in entry.evaluator.run(state[name], layout)
  }


def run(config: Any, workdir: str | None, *, dry_run: bool) -> int:
  """Checks and then trains a config, or each variant of its comparison.

  Returns:
    The exit code: 0; for what has been reported 1, data that cannot be read,
    2, a user's mistake, or 3, a loss that is not finite; 42 if SIGTERM ended
    the run before its end.
  """
  try:
    variants = comparison.variants(config, workdir)
    if config.get('comparison') and not (workdir or dry_run):
      raise ConfigError('its runs need a --workdir, to be compared there')
  except ConfigError as e:
    return report(f'config.comparison: {e}')
  plans = {v.name: preflight.check(v.config, v.workdir) for v in variants}
  for plan in plans.values():
    if plan.mistakes.messages:  # Its step and its metrics are not whole.
      continue
    check_update(plan)
    with plan.mistakes.of('config.comparison'):
      comparison.check_metric(config, plan.metrics)
  mistakes = preflight.report_mistakes(plans.values(), data_needed=not dry_run)
  if mistakes:
    return report(mistakes)
  if dry_run:
    for name, plan in plans.items():
      note(f'{name}\n{preflight.summary(plan, flops_a_step(plan))}\n')
    return 0
  try:
    with locked(workdir):
      for variant in variants:
        if not train(plans[variant.name], variant.name, variant.workdir):
          return PREEMPTED
  except ConfigError as e:
    return report(str(e))
  except (DataError, NotFinite) as e:
    report(f'{variant.name}: {e}')
    return DAMAGED_DATA if isinstance(e, DataError) else NOT_FINITE
  if config.get('comparison'):
    comparison.report(config.comparison, workdir)
  return 0


def report(mistakes: str) -> int:
  """Prints what is wrong to stderr; returns the exit code."""
  print(mistakes, file=sys.stderr)
  return USER_MISTAKE


def define_flags() -> None:
  config_flags.DEFINE_config_file('config', None, 'The config file[:ARG].')
  flags.DEFINE_string(
    'workdir', None, 'Folder, local or gs://, of checkpoints and metrics.'
  )
  flags.DEFINE_bool('dry_run', False, 'Check and tell, without training.')
  flags.mark_flag_as_required('config')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line and loads the config; a mistake there exits."""
  try:
    rest = flags.FLAGS(argv)
    flags.FLAGS.config.items  # noqa: B018 A missing file only shows in use.
    return rest
  except AttributeError as e:  # Of config_flags: an override of no field?
    if not any(arg.startswith('--config.') for arg in argv):
      raise
    text = f'--config.FIELD sets a field that the config file has: {e}'
  except (flags.Error, OSError) as e:
    # config_flags wraps what a config raises in a text with its traceback.
    text = str(e)
    while e := e.__cause__ or e.__context__:
      text = str(e) if isinstance(e, ConfigError | OSError) else text
  sys.exit(report(text))


def main(argv: list[str]) -> None:
  del argv
  if flags.FLAGS.verbosity < 1:
    logging.set_verbosity(logging.WARNING)  # Libraries; we print by `note`.
  sharding.initialize_processes()
  FLAGS = flags.FLAGS
  sys.exit(run(FLAGS.config, FLAGS.workdir, dry_run=FLAGS.dry_run))


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=parse_flags)
