"""From config to an optax chain: optimizer, schedules, decay, freezing.

The semantics are big_vision's. The chain, in this order: clip the gradients
of unfrozen parameters by their global norm, scale them by the optimizer,
multiply by `lr`, by `lr_layer_decay` and by `lr_mults`, add the decayed
weights, multiply by the schedule, negate. So weight decay follows the schedule
and is not multiplied by the learning rate.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from big_vision_dpn import chrono, pytree
from big_vision_dpn.config import (
  ConfigError,
  Mistakes,
  check_arguments,
  choose,
  unknown,
)
from big_vision_dpn.optimizers import OPTIMIZERS

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


# A ViT's parameters before its blocks.
_BEFORE_BLOCKS = ('embedding', 'pos_embedding', 'posemb_norm', 'cls')

_DURATIONS = {
  f'{name}_{unit}'
  for name in ('warmup', 'cooldown', 'timescale', 'shift')
  for unit in chrono.DURATION_UNITS
}


def _constant(progress, **_):
  return jnp.ones_like(progress)


def _cosine(progress, **_):
  return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _polynomial(progress, *, power=1.0, end=0.0, **_):
  return end + (1.0 - end) * (1.0 - progress) ** power


def _rsqrt(progress, *, step, warmup, timescale, shift, **_):
  """Zhai et al., Scaling Vision Transformers, arXiv 2106.04560."""
  since_warmup = jnp.maximum(step - warmup, 0)
  return 1.0 / jnp.sqrt(1.0 + (since_warmup + shift) / timescale)


def _stair(progress, *, step, steps=(), mults=(), **_):
  """Multiplier mults[i] from the update after the first steps[i] on."""
  stair = jnp.searchsorted(jnp.asarray(steps, jnp.float32), step + 1.0)
  return jnp.take(jnp.asarray([1.0, *mults], jnp.float32), stair)


# The course between warmup and cooldown, and the arguments that it takes.
_DECAYS: dict[str, tuple[Callable, set[str]]] = {
  'constant': (_constant, set()),
  'cosine': (_cosine, set()),
  'linear': (_polynomial, {'end', 'linear_end'}),
  'polynomial': (_polynomial, {'power', 'end', 'linear_end'}),
  'rsqrt': (_rsqrt, {k for k in _DURATIONS if k[:5] in ('times', 'shift')}),
  'stair': (_stair, {'steps', 'mults'}),
}


def make_schedule(
  total_steps: int,
  batch_size: int | None = None,
  data_size: int | None = None,
  *,
  decay_type: str = 'constant',
  **kw: Any,
) -> Schedule:
  """A multiplier of the learning rate for every step.

  Args:
    total_steps: steps of the run.
    batch_size: examples a step, for durations given in examples or epochs.
    data_size: examples an epoch, likewise.
    decay_type: constant, cosine, linear, polynomial, rsqrt or stair.
    **kw: warmup_steps (linear, from 0), cooldown_steps (linear, to 0), in any
      unit; power and end (polynomial), timescale_steps and shift_steps
      (rsqrt), steps and mults (stair).

  Returns:
    A function of the number of updates done, an int, to a float32 scalar. The
    first update has 0, so that its multiplier is 0 under a warmup.
  """
  decay, own = choose('decay_type', decay_type, _DECAYS)
  allowed = own | {k for k in _DURATIONS if k[:4] in ('warm', 'cool')}
  for name in kw:
    if name not in allowed:
      raise unknown(f'argument of the {decay_type} schedule', name, allowed)

  def duration(name: str, default: int) -> int:
    return chrono.steps(
      name,
      kw,
      batch_size=batch_size,
      data_size=data_size,
      total_steps=total_steps,
      default=default,
    )

  warmup, cooldown = duration('warmup', 0), duration('cooldown', 0)
  if warmup + cooldown > total_steps:
    raise ConfigError(
      f'warmup ({warmup}) and cooldown ({cooldown}) take more than the'
      f' {total_steps} steps of the run'
    )
  if len(kw.get('steps', ())) != len(kw.get('mults', ())):
    raise ConfigError('stair: give as many mults as steps')
  if list(kw.get('steps', ())) != sorted(kw.get('steps', ())):
    raise ConfigError('stair: the steps must ascend')
  arguments = {
    'warmup': warmup,
    'timescale': duration('timescale', 10_000),
    'shift': duration('shift', 0),
    **{k: kw[k] for k in ('power', 'end', 'steps', 'mults') if k in kw},
  }
  if 'linear_end' in kw:
    arguments['end'] = kw['linear_end']

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0, 1)
    multiplier = decay(progress, step=step, **arguments)
    if warmup:
      multiplier *= jnp.minimum(1.0, step / warmup)
    if cooldown:
      multiplier *= jnp.minimum(1.0, (total_steps - step) / cooldown)
    return jnp.asarray(multiplier, jnp.float32)

  return schedule


def _is_list(schedule: Any) -> bool:
  return isinstance(schedule, list | tuple)


def frozen(config: Mapping[str, Any], params: Any) -> dict[str, bool]:
  """Whether `config.schedule` freezes a parameter, by the parameter's name.

  Raises:
    ConfigError: a pattern that matches nothing, or a parameter that no
      pattern matches.
  """
  if not _is_list(config['schedule']):
    return dict.fromkeys(pytree.flatten_with_names(params), False)
  patterns = [(p, course is None) for p, course in config['schedule']]
  result = pytree.first_match('schedule', params, patterns)
  unmatched = [name for name, value in result.items() if value is None]
  if unmatched:
    raise ConfigError(
      f'config.schedule: no pattern matches {", ".join(unmatched)}; end the'
      ' list with (".*", …)'
    )
  return result


def _courses(
  config: Mapping[str, Any], sizes: Mapping[str, int | None]
) -> list[tuple[str, Schedule | None]]:
  """The (regex, schedule) pairs of config.schedule; None freezes."""
  patterns = config['schedule']
  patterns = patterns if _is_list(patterns) else [('.*', patterns)]
  return [
    (p, None if course is None else make_schedule(**sizes, **course))
    for p, course in patterns
  ]


def _optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
  optimizer = choose('optimizer', config['optax_name'], OPTIMIZERS)
  check_arguments(config['optax_name'], optimizer, config['optax'])
  return optimizer(**config['optax'])


def check(config: Mapping[str, Any], **sizes: int | None) -> None:
  """Raises ConfigError for what is wrong whatever the parameters are.

  Args:
    config: as for `make`.
    **sizes: total_steps, batch_size and data_size, as for `make`.
  """
  mistakes = Mistakes()
  with mistakes.of('config.optax'):
    _optimizer(config)
  with mistakes.of('config.schedule'):
    _courses(config, sizes)
  mistakes.check()


def _scale_by_schedules(
  config: Mapping[str, Any], params: Any, sizes: Mapping[str, int | None]
) -> tuple[optax.GradientTransformation, list[Schedule]]:
  """Multiplies each update by the schedule that its name selects."""
  patterns = _courses(config, sizes)
  schedules = pytree.first_match('schedule', params, patterns)

  def update(updates, state, params=None):
    del params
    scale = lambda name, u: u * schedules[name](state.count)
    return pytree.map_with_names(scale, updates), optax.ScaleByScheduleState(
      count=optax.safe_increment(state.count)
    )

  transform = optax.GradientTransformation(
    lambda _: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)), update
  )
  return transform, [schedule for _, schedule in patterns if schedule]


_BLOCK = re.compile(r'(.*Transformer/)encoderblock(?:_(\d+))?/.*')


def _layer_decay(
  config: Mapping[str, Any], params: Any
) -> dict[str, float | np.ndarray]:
  """Multipliers by parameter name; for a scan's, one for each block.

  Source: Bao et al., BEiT, https://arxiv.org/abs/2106.08254: a block has
  decay^(blocks behind it + 1), what is before the blocks once more, and what
  is behind them 1.
  """
  decay, arrays = config['lr_layer_decay'], pytree.flatten_with_names(params)
  blocks = {name: match for name in arrays if (match := _BLOCK.match(name))}
  if not blocks:
    raise ConfigError('config.lr_layer_decay: the model has no blocks')
  depth = max(
    int(m[2]) + 1 if m[2] else arrays[name].shape[0]
    for name, m in blocks.items()
  )

  def multiplier(name: str, x: Any) -> float | np.ndarray:
    if (match := blocks.get(name)) is None:
      before = name.split('/')[0] in _BEFORE_BLOCKS
      return decay ** (depth + 1) if before else 1.0
    if match[2]:
      return decay ** (depth - int(match[2]))
    powers = np.float32(decay) ** np.arange(depth, 0, -1, dtype=np.float32)
    return powers.reshape(-1, *(1,) * (len(x.shape) - 1))

  return {name: multiplier(name, x) for name, x in arrays.items()}


def _scale_by_multipliers(
  multipliers: Mapping[str, float | np.ndarray],
) -> optax.GradientTransformation:
  scale = lambda name, u: u * multipliers[name]
  return optax.stateless(lambda u, _: pytree.map_with_names(scale, u))


def _add_decayed_weights(
  wd: float, multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
  """Adds wd × multiplier × parameter to the update."""

  def update(updates, params):
    params = pytree.flatten_with_names(params)
    decay = lambda name, u: u + wd * multipliers[name] * params[name]
    return pytree.map_with_names(decay, updates)

  return optax.stateless(update)


def make(
  config: Mapping[str, Any],
  params: Any,
  *,
  total_steps: int,
  batch_size: int,
  data_size: int | None = None,
) -> tuple[optax.GradientTransformation, list[Schedule]]:
  """The optimizer of a config.

  Args:
    config: resolved; read are optax_name, optax, lr, lr_mults, wd, wd_mults,
      schedule and grad_clip_norm.
    params: the parameters, or their shapes.
    total_steps: steps of the run.
    batch_size: examples a step.
    data_size: examples an epoch, where known.

  Returns:
    The optax transformation, and the schedules of the unfrozen parameters.

  Raises:
    ConfigError: an unknown optimizer, argument or schedule; a pattern that
      matches nothing.
  """
  is_frozen = frozen(config, params)
  if all(is_frozen.values()):
    raise ConfigError('config.schedule freezes every parameter')
  sizes = {'batch_size': batch_size, 'data_size': data_size}
  by_schedule, schedules = _scale_by_schedules(
    config, params, {'total_steps': total_steps, **sizes}
  )
  chain = [_optimizer(config), optax.scale(config['lr'])]
  if config['grad_clip_norm']:
    chain.insert(0, optax.clip_by_global_norm(config['grad_clip_norm']))
  if config['lr_layer_decay'] is not None:
    chain.append(_scale_by_multipliers(_layer_decay(config, params)))
  if config['lr_mults']:
    chain.append(
      _scale_by_multipliers(
        pytree.first_match('lr_mults', params, config['lr_mults'], 1.0)
      )
    )
  if config['wd']:
    multipliers = pytree.first_match(
      'wd_mults', params, config['wd_mults'], default=0.0
    )
    chain.append(_add_decayed_weights(config['wd'], multipliers))
  chain += [by_schedule, optax.scale(-1.0)]

  labels = pytree.map_with_names(
    lambda name, _: 'frozen' if is_frozen[name] else 'trained', params
  )
  transforms = {'trained': optax.chain(*chain), 'frozen': optax.set_to_zero()}
  return optax.partition(transforms, labels), schedules
