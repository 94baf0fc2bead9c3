"""The mean over a split of whatever metrics the predict function gives.

The function (params, batch) returns a dict of arrays, one value an example.
"""

from typing import Any

import jax

from big_vision_dpn.evaluators import common


class Evaluator(common.MeanEvaluator):
  """See the module."""

  def per_example(self, params: Any, batch: Any) -> tuple[dict, jax.Array]:
    return self.predict_fn(params, batch), batch['_mask']
