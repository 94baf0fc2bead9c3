"""Ops on tensors of any kind, and on the dict of features.

Those of `ops_lookup` and `ops_choice` come with this module.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, unknown
from big_vision_dpn.pp import ops_lookup  # noqa: F401, registers its op.
from big_vision_dpn.pp.deferred import defer

# Registers its ops as well.
from big_vision_dpn.pp.ops_choice import check_keys
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

  Any numeric tensor becomes a float32 one of its shape. On a uint8 one as the
  last op, this is done on the device: see `builder.Preprocess`.

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

  return linear_map(low, high - low, vmin, vmax, clip_values)


def linear_map(
  low: np.ndarray,
  span: np.ndarray,
  vmin: float = 0.0,
  vmax: float = 1.0,
  clip_values: bool = False,
) -> Callable[[tf.Tensor], tf.Tensor]:
  """The function vmin + (x − low) / span · (vmax − vmin), in float32.

  Args:
    low: float32, one number or one for each channel (the last axis).
    span: likewise.
    vmin: what `low` becomes.
    vmax: what `low + span` becomes.
    clip_values: clip the result to [vmin, vmax].

  Returns:
    An op's function, of any numeric tensor. It leaves a uint8 one to the device
    if it can: see `deferred`.
  """

  def scale(x: Any) -> Any:
    # In this order the two ends are exact: 0 and 255 become -1 and 1.
    return vmin + (x - low) / span * (vmax - vmin)

  def on_device(x: Any) -> Any:
    result = scale(x.astype(np.float32))
    return result.clip(vmin, vmax) if clip_values else result

  def fn(x: tf.Tensor) -> tf.Tensor:
    x = x if tf.is_tensor(x) else tf.convert_to_tensor(x)
    result = scale(tf.cast(x, tf.float32))
    if clip_values:
      result = tf.clip_by_value(result, vmin, vmax)
    # With fewer axes than `low` has, a batch has others at their places.
    aligned = (x.shape.rank or 0) >= (low + span).ndim
    if isinstance(x, tf.Tensor) and x.dtype == tf.uint8 and aligned:
      defer(result, x, on_device)
    return result

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


@register('squeeze_last_dim', key='image')
def squeeze_last_dim() -> Callable[[tf.Tensor], tf.Tensor]:
  """Drops the last axis, whose size is 1: [..., 1] becomes [...]."""
  return lambda x: tf.squeeze(x, axis=-1)


@register('concat')
def concat(
  inkeys: Sequence[str], outkey: str | None = None, axis: int = -1
) -> Callable[[Features], Features]:
  """Joins features along an axis that they all have.

  Args:
    inkeys: the features to read, of one dtype, whose shapes differ along
      `axis` alone.
    outkey: the feature to write; None means the first of `inkeys`.
    axis: the axis; negative ones count from the last.
  """
  inkeys = check_keys('inkeys', inkeys)

  def fn(features: Features) -> Features:
    value = tf.concat([features[key] for key in inkeys], axis)
    return {**features, outkey or inkeys[0]: value}

  return fn


@register('rag_tensor', key='image')
def rag_tensor() -> Callable[[tf.Tensor], tf.RaggedTensor]:
  """Makes a RaggedTensor, so that examples of different lengths can be batched.

  A tensor of shape [n, ...] becomes a ragged one of shape [1, None, ...].
  """
  return lambda x: tf.RaggedTensor.from_tensor(tf.convert_to_tensor(x)[None])


@register('pad_to_shape', key='image')
def pad_to_shape(
  shape: Sequence[int | None],
  pad_value: Any = 0,
  where: str = 'after',
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Pads a tensor to a shape, which is then known before there is data.

  Args:
    shape: a size for every axis; None leaves the axis as it is.
    pad_value: what to fill in; for strings a string.
    where: "after" the values, "before" them, or "both", then with the odd
      element after them.

  The function raises InvalidArgumentError at run time for a tensor that is
  larger than `shape`.
  """
  _check_shape('shape', shape, lambda n: n is None or (_is_int(n) and n >= 0))
  if where not in ('before', 'after', 'both'):
    raise unknown('value of where', where, ('before', 'after', 'both'))

  def fn(x: tf.Tensor) -> tf.Tensor:
    x = tf.convert_to_tensor(x)
    if x.shape.rank != len(shape) or any(
      None not in (have, want) and have > want
      for have, want in zip(x.shape, shape, strict=True)
    ):
      raise ConfigError(
        f'a tensor of shape {x.shape} cannot be padded to {tuple(shape)};'
        ' expected as many axes, and none that is longer'
      )
    size = tf.shape(x)
    want = [size[i] if n is None else n for i, n in enumerate(shape)]
    missing = tf.stack(want) - size
    before = {'after': 0 * missing, 'before': missing, 'both': missing // 2}
    before = before[where]
    fits = tf.debugging.assert_non_negative(
      missing, f'pad_to_shape: the tensor is larger than {tuple(shape)}'
    )
    with tf.control_dependencies([fits] if fits is not None else []):
      paddings = tf.stack([before, missing - before], axis=1)
    value = _constant('pad_value', pad_value, x.dtype)
    return tf.ensure_shape(tf.pad(x, paddings, constant_values=value), shape)

  return fn


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _check_shape(
  name: str, shape: Any, fits: Callable[[Any], bool] = _is_int
) -> None:
  if not isinstance(shape, list | tuple) or not all(fits(n) for n in shape):
    raise ConfigError(f'{name} is {shape!r}; expected sizes such as (16, 3)')


def _constant(name: str, value: Any, dtype: tf.DType) -> tf.Tensor:
  """`value` as a tensor of `dtype`, or a ConfigError if it does not fit."""
  try:
    constant = tf.constant(value, dtype)
    # TensorFlow takes -1 for a uint8, as 255.
    if dtype.is_integer and np.any(
      np.asarray(value).astype(dtype.as_numpy_dtype) != np.asarray(value)
    ):
      raise ValueError
  except (TypeError, ValueError, OverflowError) as e:
    raise ConfigError(
      f'{name} is {value!r}; expected a value that a feature of dtype'
      f' {dtype.name} can have'
    ) from e
  return constant


@register('flatten')
def flatten(
  keys: str | Sequence[str] | None = None,
) -> Callable[[Features], Features]:
  """Replaces nested features by their parts, which are called "outer/inner".

  Parts of a tuple or a list are called by their places, "outer/0".

  Args:
    keys: the features to flatten; None means all.
  """
  chosen = None if keys is None else check_keys('keys', keys)

  def fn(features: Features) -> Features:
    nested = {key: features[key] for key in chosen or features}
    flat = {k: v for k, v in features.items() if k not in nested}
    for key, value in nested.items():
      for name, part in _parts(key, value):
        if name in flat:
          raise ConfigError(f'two features would be called {name!r}; drop one')
        flat[name] = part
    return flat

  return fn


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
  if isinstance(value, list | tuple):
    value = dict(enumerate(value))
  if not isinstance(value, dict):
    yield name, value
    return
  for key, part in value.items():
    yield from _parts(f'{name}/{key}', part)


@register('reshape', key='image')
def reshape(new_shape: Sequence[int]) -> Callable[[tf.Tensor], tf.Tensor]:
  """Gives a tensor another shape of as many elements.

  Args:
    new_shape: a size for every axis; one of them may be -1, for the rest.
  """
  _check_shape('new_shape', new_shape, lambda n: _is_int(n) and n >= -1)
  if list(new_shape).count(-1) > 1:
    raise ConfigError(f'new_shape is {new_shape!r}; expected -1 once at most')
  return lambda x: tf.reshape(x, new_shape)


@register('setdefault')
def setdefault(key: str, value: Any) -> Callable[[Features], Features]:
  """Gives a feature a value if it is missing or has no elements.

  Args:
    key: the feature.
    value: a literal. If the feature is there, the value takes its dtype and
      rank: an empty [0] becomes [value], or `value` if that is a list.
  """

  def fn(features: Features) -> Features:
    if key not in features:
      return {**features, key: tf.constant(value)}
    x = tf.convert_to_tensor(features[key])
    default = _as_default(key, value, x)
    if x.shape.num_elements() is None:
      filled = tf.cond(tf.size(x) > 0, lambda: x, lambda: default)
    else:
      filled = x if x.shape.num_elements() else default
    return {**features, key: filled}

  return fn


def _as_default(key: str, value: Any, x: tf.Tensor) -> tf.Tensor:
  """`value` with the dtype of `x`, and as many axes."""
  default = _constant('value', value, x.dtype)
  try:
    shape = np.broadcast_shapes([n or 1 for n in x.shape], default.shape)
  except ValueError:
    shape = None
  # An axis of x without elements fits any.
  if (
    shape is None
    or len(shape) != x.shape.rank
    or any(have and have != n for n, have in zip(shape, x.shape, strict=True))
  ):
    raise ConfigError(
      f'value is {value!r}; expected one that fits {key!r}, of shape {x.shape}'
    )
  return tf.broadcast_to(default, shape)
