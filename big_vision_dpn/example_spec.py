"""What one preprocessed example is made of, and whether devices can hold it."""

from collections.abc import Callable, Sequence

import jax
import tensorflow as tf

from big_vision_dpn.config import ConfigError, Mistakes
from big_vision_dpn.datasets.core import Features, Source, spec_of

Preprocess = Callable[[Features, tf.Tensor], Features]
ExampleSpec = dict[str, tf.TypeSpec]


def make(source: Source, preprocess: Preprocess) -> ExampleSpec:
  """Specs of the preprocessed features of one example; reads no data."""
  key = tf.TensorSpec([2], tf.int64)
  return spec_of(
    lambda record, key: preprocess(source.parse(record), key),
    source.record_spec,
    key,
  )


def batch_shapes(
  spec: ExampleSpec, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch of the features that devices can hold."""
  return {
    key: jax.ShapeDtypeStruct((batch_size, *s.shape), s.dtype.as_numpy_dtype)
    for key, s in spec.items()
    if _fits_devices(s)
  }


def _fits_devices(spec: tf.TypeSpec) -> bool:
  return (
    isinstance(spec, tf.TensorSpec)
    and spec.dtype != tf.string
    and spec.shape.is_fully_defined()
  )


def check(spec: ExampleSpec, needs: Sequence[str]) -> None:
  """Raises ConfigError unless examples have what the devices need.

  Args:
    spec: of one preprocessed example.
    needs: the features that must be there, numeric and of a fixed shape.
  """
  mistakes = Mistakes()
  for name in needs:
    with mistakes.of(''):
      if name not in spec:
        raise ConfigError(
          f'gives {", ".join(map(repr, spec)) or "nothing"}, but {name!r} is'
          ' needed; let it make and keep it'
        )
      feature = spec[name]
      if feature.dtype == tf.string:
        raise ConfigError(
          f'gives {name!r} as a string; expected numbers. If it is an encoded'
          ' image, add decode'
        )
      if not _fits_devices(feature):
        raise ConfigError(
          f'leaves {name!r} with the shape {feature.shape}, so that examples'
          ' differ; add e.g. resize(224) or central_crop(224)'
        )
  mistakes.check()
