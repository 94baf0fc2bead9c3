"""Losses of one example each; the caller takes the mean over the batch."""

import jax
import jax.numpy as jnp


def sigmoid_xent(*, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Sum over the classes of the binary cross-entropies.

  Args:
    logits: (…, classes) float.
    labels: (…, classes) float, each in [0, 1].

  Returns:
    (…) float.
  """
  log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  return -jnp.sum(labels * log_p + (1.0 - labels) * log_not_p, axis=-1)


def softmax_xent(*, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy of the softmax against a distribution over the classes.

  Args:
    logits: (…, classes) float.
    labels: (…, classes) float, which sum to one.

  Returns:
    (…) float.
  """
  return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)


LOSSES = {'sigmoid_xent': sigmoid_xent, 'softmax_xent': softmax_xent}
