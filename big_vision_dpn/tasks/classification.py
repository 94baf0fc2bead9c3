"""Image classification: one or several labels an image.

A batch has `image`, (n, h, w, c) float32, and `labels`, (n, classes) float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from big_vision_dpn import losses, models
from big_vision_dpn.config import ConfigError, Mistakes, check_arguments, choose

Batch = Mapping[str, jax.Array]


def mixup(
  rng: jax.Array, p: float, *things: jax.Array
) -> tuple[jax.Array, ...]:
  """Mixes each example with its neighbour (Zhang et al., arXiv 1710.09412).

  Args:
    rng: random key.
    p: one a ~ Beta(p, p) is drawn for the batch; the larger of a and 1 - a
      weighs the example, the rest its neighbour.
    *things: arrays whose first dimension is the example.
  """
  a = jax.random.beta(rng, p, p)
  a = jnp.maximum(a, 1.0 - a)
  return tuple(a * x + (1.0 - a) * jnp.roll(x, 1, axis=0) for x in things)


class Task:
  """Classification with a model, a loss and mixup. See `tasks`."""

  needs = ('image', 'labels')

  def __init__(self, config: Any):
    self._num_classes = config.num_classes
    self._head_bias = config.init_head_bias
    mistakes = Mistakes()
    with mistakes.of('config.num_classes'):
      if not config.num_classes:
        raise ConfigError('missing: the number of labels')
    with mistakes.of('config.loss'):
      self._loss = choose('loss', config.loss, losses.LOSSES)
    with mistakes.of('config.mixup'):
      check_arguments('mixup', lambda p: p, config.mixup or {})
      self._mixup_p = (config.mixup or {}).get('p', 0)
      if self._mixup_p < 0:
        raise ConfigError(f'p={self._mixup_p}: expected 0 or more')
    with mistakes.of('config.model'):
      if 'num_classes' in config.model:
        raise ConfigError('num_classes is a field of the config itself')
      self.model = models.module(config.model_name).Model(
        config.num_classes, **config.model
      )
    mistakes.check()
    self.predict_fns = {'predict': self._predict, 'loss': self._losses}

  def check(self, batch_spec: Batch) -> None:
    image, labels = batch_spec['image'], batch_spec['labels']
    mistakes = Mistakes()
    with mistakes.of('config.input.pp'):
      if len(image.shape) != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ConfigError(
          f'gives images {image.dtype}{list(image.shape[1:])}; expected float32'
          ' of height, width, channels: end it with value_range(-1, 1)'
        )
    with mistakes.of('config.input.pp'):
      if labels.shape[1:] != (self._num_classes,):
        raise ConfigError(
          f'gives labels of shape {list(labels.shape[1:])}; expected'
          f' [{self._num_classes}], config.num_classes: use'
          f' onehot({self._num_classes}, key="label", key_result="labels")'
        )
    mistakes.check()

  def init(self, rng: jax.Array, batch: Batch) -> Any:
    params = self.model.init(rng, batch['image'])['params']
    if self._head_bias is not None:
      bias = params['head']['bias']
      params['head']['bias'] = jnp.full_like(bias, self._head_bias)
    return params

  def augment(self, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    if not self._mixup_p:
      return batch
    image, labels = mixup(rng, self._mixup_p, batch['image'], batch['labels'])
    return {**batch, 'image': image, 'labels': labels}

  def loss(
    self, params: Any, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits, _ = self.model.apply(
      {'params': params}, batch['image'], train=True, rngs={'dropout': rng}
    )
    loss = jnp.mean(self._loss(logits=logits, labels=batch['labels']))
    return loss, {'training_loss': loss}

  def _predict(
    self, params: Any, batch: Batch
  ) -> tuple[jax.Array, dict[str, Any]]:
    return self.model.apply({'params': params}, batch['image'])

  def _losses(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
    logits, _ = self._predict(params, batch)
    return {'loss': self._loss(logits=logits, labels=batch['labels'])}
