"""The random draws of one example, as a pure function of its seed."""

import tensorflow as tf

# To draw this many takes no longer than to draw one; few pipelines need more.
_CHUNK = 64
# The floats of tf.random are multiples of 2^-23.
_BITS = 23


class Rng:
  """Hands out one example's uniform draws, one after another.

  Which op gets which draw is settled while the pipeline is traced: the first
  call gets the first number, so an op that stands twice in a pp string draws
  twice, and the same seed always gives the same example.

  Draw outside of the branches of `tf.cond` and `tf.switch_case`: a branch that
  draws may make tensors which the ops after it cannot reach.
  """

  def __init__(self, seed: tf.Tensor):
    """`seed`: int32 or int64 of shape [2], its own for every example."""
    self._seed = tf.convert_to_tensor(seed)
    self._chunk = tf.random.stateless_uniform([_CHUNK], self._seed)
    self._used = 0

  def uniform(self, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
    """A float32 scalar, uniform in [low, high)."""
    return low + self._next() * (high - low)

  def integer(self, n: int | tf.Tensor) -> tf.Tensor:
    """An int32 scalar, uniform in [0, n), for n up to about a million."""
    return tf.cast(self._next() * tf.cast(n, tf.float32), tf.int32)

  def coin(self) -> tf.Tensor:
    """A bool scalar, true half of the time."""
    return self._next() < 0.5

  def seed(self) -> tf.Tensor:
    """An int32 of shape [2], to seed one stateless TensorFlow op."""
    return tf.stack([self.integer(1 << _BITS), self.integer(1 << _BITS)])

  def _next(self) -> tf.Tensor:
    place = self._used % _CHUNK
    if self._used and place == 0:
      seed = tf.random.experimental.stateless_fold_in(
        self._seed, self._used // _CHUNK
      )
      self._chunk = tf.random.stateless_uniform([_CHUNK], seed)
    self._used += 1
    return self._chunk[place]
