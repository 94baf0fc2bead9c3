"""Ops on tensors of any kind, and on the dict of features."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.registry import Features, register


@register('value_range', key='image')
def value_range(
  vmin: float = -1,
  vmax: float = 1,
  in_min: float | Sequence[float] = 0,
  in_max: float | Sequence[float] = 255,
  clip_values: bool = False,
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Maps values linearly, so that [in_min, in_max] becomes [vmin, vmax].

  Any numeric tensor becomes a float32 one of its shape.

  Args:
    vmin: what `in_min` becomes.
    vmax: what `in_max` becomes.
    in_min: one number, or one for each channel (the last axis).
    in_max: likewise.
    clip_values: clip the result to [vmin, vmax].
  """
  vmin, vmax = float(vmin), float(vmax)
  low = np.asarray(in_min, np.float32)
  high = np.asarray(in_max, np.float32)
  if np.any(low == high):
    raise ConfigError(f'in_min and in_max are equal: {in_min}, {in_max}')

  def fn(x: tf.Tensor) -> tf.Tensor:
    # In this order the two ends are exact: 0 and 255 become -1 and 1.
    unit = (tf.cast(x, tf.float32) - low) / (high - low)
    x = vmin + unit * (vmax - vmin)
    return tf.clip_by_value(x, vmin, vmax) if clip_values else x

  return fn


@register('onehot')
def onehot(
  depth: int,
  key: str = 'labels',
  key_result: str | None = None,
  multi: bool = True,
  on: float = 1.0,
  off: float = 0.0,
) -> Callable[[Features], Features]:
  """Encodes integer labels as float32 vectors of `depth` entries.

  A negative label stands for no label: its vector is all `off`.

  Args:
    depth: the number of classes.
    key: the feature to read: a label, or any number of them.
    key_result: the feature to write; None means `key`.
    multi: several labels become one vector, `on` at each of them; otherwise
      every label has its own vector, along a new last axis.
    on: the entry at a label.
    off: every other entry.

  The function raises InvalidArgumentError at run time for a label of `depth`
  or more, which would otherwise turn into an example without a label.
  """
  if type(depth) is not int or depth < 1:
    raise ConfigError(f'depth is the number of classes, not {depth!r}')

  def fn(features: Features) -> Features:
    labels = tf.cast(features[key], tf.int64)
    fits = tf.debugging.assert_less(
      labels,
      tf.constant(depth, tf.int64),
      f'onehot: {key!r} has a label outside of the {depth} classes',
    )
    with tf.control_dependencies([fits] if fits is not None else []):
      labels = tf.identity(labels)
    if multi and labels.shape.rank != 0:
      labels = tf.reshape(labels, [-1])
      # It drops the negative ones, and needs no vector for every label.
      count = tf.math.unsorted_segment_sum(
        tf.ones_like(labels, tf.float32), labels, depth
      )
      vector = tf.minimum(count, 1.0) * (on - off) + off
    else:
      vector = tf.one_hot(labels, depth, float(on), float(off))
    return {**features, key_result or key: vector}

  return fn


@register('keep')
def keep(*keys: str) -> Callable[[Features], Features]:
  """Keeps these features and drops all others; each of them must be there."""
  return lambda features: {key: features[key] for key in keys}


@register('drop')
def drop(*keys: str) -> Callable[[Features], Features]:
  """Drops these features and keeps all others; each of them must be there."""

  def fn(features: Features) -> Features:
    for key in keys:
      del features[key]
    return features

  return fn


@register('copy')
def copy(inkey: str, outkey: str) -> Callable[[Features], Features]:
  """Gives the feature `inkey` a second name, `outkey`."""
  return lambda features: {**features, outkey: features[inkey]}
