r"""What a training step takes: of models beside each other.

    bash tools/run.sh tools.benchmark step
    bash tools/run.sh tools.benchmark step --batch_size 64 \
      patch_norm=dual patch_norm=dual,dtype_mm=bfloat16 \
      patch_norm=dual,dtype_mm=bfloat16,scan=True

Each argument is a model: fields of config.model, over those of the config. All
are compiled; then they take turns, a step each, on random images. No data is
read. The first one is what the others are compared with:

  ms        median time of a step: forward, backward, update
  images/s  on all devices
  ratio     median over the rounds of the time by that of the first model
  GFLOP     of a step, by XLA's count for the lowered program
"""

import argparse
import ast
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from big_vision_dpn import preflight, train
from big_vision_dpn.config import ConfigError
from tools.benchmark import load_config

CONFIG = 'configs/proj/dpn/vit_i1k.py:variant=S/16'
MODELS = ['patch_norm=none', 'patch_norm=dual']


def parse_fields(text: str) -> dict[str, Any]:
  """'patch_norm=dual,depth=3' as a dict; a value is a Python literal or text.

  Raises:
    ConfigError: not of this form.
  """
  fields = {}
  for part in text.split(','):
    name, equals, value = part.partition('=')
    if not equals:
      raise ConfigError(f'{text!r}: expected FIELD=VALUE,FIELD=VALUE,…')
    try:
      fields[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      fields[name] = value
  return fields


def _random(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> Any:
  if np.issubdtype(shape.dtype, np.floating):
    return rng.uniform(-1, 1, shape.shape).astype(shape.dtype)
  return rng.integers(0, 2, shape.shape, shape.dtype)


class Model:
  """A model whose steps are measured.

  Args:
    config: of a run; its model, input.batch_size and optimizer count.

  Raises:
    ConfigError: the config has a mistake.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    plan = preflight.check(config)
    mistakes = preflight.report_mistakes([plan], data_needed=False)
    if mistakes:
      raise ConfigError(mistakes)
    rng = np.random.default_rng(0)
    batch = {k: _random(s, rng) for k, s in plan.host_shapes.items()}
    self._batch = plan.layout.put_batch(batch)
    self._state = train.init_state(plan)
    jitted = jax.jit(train.make_update_fn(plan), donate_argnums=0)
    lowered = jitted.lower(self._state, self._batch, 0)
    self.gflop = lowered.cost_analysis()['flops'] / 1e9
    self._step = lowered.compile()
    self.seconds: list[float] = []

  def run(self, measured: bool) -> None:
    """A step."""
    start = time.perf_counter()
    self._state, _ = self._step(self._state, self._batch, 0)
    jax.block_until_ready(self._state)
    if measured:
      self.seconds.append(time.perf_counter() - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Of the subcommand."""
  parser.add_argument(
    'models', nargs='*', default=MODELS, help=f'default: {" ".join(MODELS)}'
  )
  parser.add_argument(
    '--config', metavar='FILE[:ARG]', default=CONFIG, help=f'default: {CONFIG}'
  )
  parser.add_argument('--batch_size', type=int, default=8, help='default: 8')
  parser.add_argument('--rounds', type=int, default=15, help='default: 15')


def run(args: argparse.Namespace) -> None:
  """Measures and prints."""
  models = {}
  for text in args.models:
    config = load_config(args.config)
    config.input.batch_size = args.batch_size
    config.model.update(parse_fields(text))
    models[text] = Model(config)
  for i in range(args.rounds + 2):
    for model in models.values():
      model.run(measured=i >= 2)
  first = next(iter(models.values()))
  device = jax.devices()[0]
  width = max(map(len, models))
  print(
    f'{args.config}, batches of {args.batch_size}, {args.rounds} rounds on'
    f' {jax.device_count()} {device.platform} ({device.device_kind})\n\n'
    f'{"":{width}}        ms  images/s  ratio    GFLOP'
  )
  for text, model in models.items():
    ms = np.median(model.seconds) * 1e3
    ratio = np.median(np.divide(model.seconds, first.seconds))
    print(
      f'{text:{width}}  {ms:8.1f}  {args.batch_size / ms * 1e3:8.1f}'
      f'  {ratio:5.3f}  {model.gflop:7.1f}'
    )
