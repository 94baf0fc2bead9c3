"""Work that an op leaves to the device, if nothing after it needs the result.

A uint8 image that the last op turns to float32 would cross to the device with
four times the bytes. Such an op computes the tensor as always, and notes from
which smaller one, and how, the device may compute it. A feature that is that
very tensor in the end is replaced by the smaller one: TensorFlow then never
computes the other. Whatever stands in between (keep, copy) needs no rule, and
an op that reads the tensor simply gets it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

Features = dict[str, Any]
DeviceFn = Callable[[Any], Any]

_notes = contextvars.ContextVar('notes', default=None)


def defer(result: tf.Tensor, source: tf.Tensor, fn: DeviceFn) -> None:
  """Notes that `fn` makes a batch of `result` from a batch of `source`.

  Args:
    result: what an op returns for one example.
    source: of the same shape, with fewer bytes.
    fn: from a jax array [batch, *shape] to one of `result`'s dtype; it is
      traced by jax.
  """
  if (notes := _notes.get()) is not None:
    notes.append((result, source, fn))


@contextlib.contextmanager
def noting() -> Iterator[Callable[[Features], dict[str, DeviceFn]]]:
  """Collects what ops in the `with` block note.

  Yields:
    A function that replaces the features in a dict that the device may
    compute, and returns the functions for it by the features' names.
  """
  notes: list[tuple[tf.Tensor, tf.Tensor, DeviceFn]] = []

  def replace(features: Features) -> dict[str, DeviceFn]:
    left = {}
    for name, value in features.items():
      for result, source, fn in notes:
        if value is result:
          features[name], left[name] = source, fn
    return left

  token = _notes.set(notes)
  try:
    yield replace
  finally:
    _notes.reset(token)
