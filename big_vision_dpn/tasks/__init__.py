"""Tasks: what differs between kinds of training, and nothing else.

A task is a class, built from the resolved config, with

- `needs`: the features that a training batch must have;
- `check(batch_spec)`: raises ConfigError if the model cannot take them;
- `init(rng, batch) -> params`: fresh parameters; traceable;
- `augment(batch, rng) -> batch`: what mixes examples of the batch; traceable;
- `loss(params, batch, rng) -> (loss, measurements)`: a scalar to minimise, the
  mean over the examples, and a dict of such means to report; traceable;
- `predict_fns`: functions (params, batch) by name, for the evaluators.
"""

import importlib
from typing import Any

from big_vision_dpn.config import choose

TASKS = {'classification': 'big_vision_dpn.tasks.classification'}


def make(config: Any) -> Any:
  """The task that `config.task` names."""
  module = importlib.import_module(choose('task', config.task, TASKS))
  return module.Task(config)
