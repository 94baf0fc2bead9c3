"""Several variants of one config, trained in turn and shown side by side.

    config.comparison = dict(
      runs=[('dpn', dict(model=dict(patch_norm='dual'))),
            ('baseline', dict(model=dict(patch_norm='none')))],
      metric='val/prec@1',
    )

Each run has the config's fields but those that `runs` sets anew, and a
subfolder of the workdir.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from tensorflow.io import gfile

from big_vision_dpn import writers
from big_vision_dpn.config import ConfigError, check_arguments, choose


@dataclasses.dataclass(frozen=True)
class Variant:
  """One run: its name, its own config, its own folder."""

  name: str
  config: ml_collections.ConfigDict
  workdir: str | None


def _fields(runs: list, metric: str, next_steps: str = '') -> None:
  """The fields of config.comparison."""


def variants(
  config: ml_collections.ConfigDict, workdir: str | None
) -> list[Variant]:
  """The runs that a config stands for: one, or those of its comparison.

  Raises:
    ConfigError: a comparison without runs, with two of one name, or with
      unknown fields.
  """
  if not config.get('comparison'):
    return [Variant('train', config, workdir)]
  spec = config.comparison
  check_arguments('comparison', _fields, spec)
  if not spec.get('runs') or not spec.get('metric'):
    raise ConfigError('needs runs, a list of (name, fields), and metric')
  for run in spec.runs:
    if not _is_run(run):
      raise ConfigError(f'runs has {run!r}; expected (name, fields)')
  names = [name for name, _ in spec.runs]
  if len(set(names)) < len(names):  # They would share a folder.
    raise ConfigError(f'runs has a name twice: {", ".join(names)}')
  result = []
  for name, fields in spec.runs:
    own = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
    del own.comparison
    own.update(fields)
    folder = os.path.join(workdir, name) if workdir else None
    result.append(Variant(name, own, folder))
  return result


def _is_run(run: Any) -> bool:
  return (
    isinstance(run, list | tuple)
    and len(run) == 2
    and isinstance(run[0], str)
    and isinstance(run[1], Mapping | ml_collections.ConfigDict)
  )


def check_metric(
  config: ml_collections.ConfigDict, metrics: Sequence[str]
) -> None:
  """Raises ConfigError unless the runs will measure comparison.metric."""
  if config.get('comparison'):
    choose('metric', config.comparison.metric, dict.fromkeys(metrics))


def report(spec: Mapping[str, Any], workdir: str) -> None:
  """Prints the runs' results and draws `comparison.png` into the workdir."""
  if jax.process_index():
    return
  metric = spec['metric']
  curves = {
    name: writers.read_metrics(os.path.join(workdir, name))
    for name, _ in spec['runs']
  }
  picture = os.path.join(workdir, 'comparison.png')
  _draw(curves, metric, picture)
  width = max(map(len, curves))
  lines = [f'\n{"":<{width}}  {metric:>12}  training_loss']
  for name, records in curves.items():
    result = _curve(records, metric)[1][-1]
    loss = _curve(records, 'training_loss')[1][-1]
    lines.append(f'{name:<{width}}  {result:>12.4f}  {loss:>13.4f}')
  lines += [f'one seed each; curves in {picture}', spec.get('next_steps', '')]
  writers.note('\n'.join(lines))


def _curve(records: list[dict], name: str) -> tuple[list[int], list[float]]:
  points = [(r['step'], r[name]) for r in records if name in r]
  if not points:
    raise ConfigError(f'a run has not measured {name!r}')
  return tuple(zip(*points, strict=True))


def _draw(curves: Mapping[str, list[dict]], metric: str, path: str) -> None:
  """Training loss on the left, `metric` with its last values on the right."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(10, 4), layout='constrained')
  left, right = figure.subplots(1, 2)
  for name, records in curves.items():
    left.plot(*_curve(records, 'training_loss'), label=name)
    steps, values = _curve(records, metric)
    right.plot(steps, values, marker='.', label=f'{name}: {values[-1]:.4f}')
  left.set(xlabel='step', title='training_loss', yscale='log')
  right.set(xlabel='step', title=metric)
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
  with gfile.GFile(path, 'wb') as f:
    figure.savefig(f, format='png', dpi=120)
