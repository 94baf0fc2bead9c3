"""Top-1 accuracy and loss on a split: `prec@1`, `loss`.

As in big_vision: an example without any label does not count, and one with
several is right if the arg-max is one of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from big_vision_dpn import losses
from big_vision_dpn.config import ConfigError, choose
from big_vision_dpn.evaluators import common


class Evaluator(common.MeanEvaluator):
  """See the module. Batches need `image` and `label_key`, (n, classes)."""

  def __init__(
    self,
    predict_fn: Any,
    *,
    data: Any,
    pp_fn: str = '',
    batch_size: int,
    input_config: Any,
    loss_name: str = 'sigmoid_xent',
    label_key: str = 'labels',
  ):
    self._loss = choose('loss', loss_name, losses.LOSSES)
    self._label_key = label_key
    self.needs = ('image', label_key)
    super().__init__(
      predict_fn,
      data=data,
      pp_fn=pp_fn,
      batch_size=batch_size,
      input_config=input_config,
    )

  def per_example(self, params: Any, batch: Any) -> tuple[dict, jax.Array]:
    labels = batch[self._label_key]
    logits, _ = self.predict_fn(params, batch)
    if labels.shape != logits.shape:  # Some would broadcast, to a wrong loss.
      raise ConfigError(
        f'pp_fn: gives {self._label_key!r} of shape {list(labels.shape[1:])};'
        f' the model has outputs of shape {list(logits.shape[1:])}'
      )
    best = jnp.argmax(logits, axis=-1)
    values = {
      'prec@1': jnp.take_along_axis(labels, best[:, None], axis=-1)[:, 0] > 0,
      'loss': self._loss(logits=logits, labels=labels),
    }
    labelled = jnp.max(labels, axis=-1) > 0
    return values, batch['_mask'] * labelled
