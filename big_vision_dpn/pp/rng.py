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
    self.key = tf.convert_to_tensor(seed)
    self._chunk = tf.zeros([0])
    self._chunks = self._left = 0

  def floats(self, n: int) -> tf.Tensor:
    """`n` float32 numbers, uniform in [0, 1), for a function in NumPy.

    There `int(u * m)` is a whole number in [0, m), for m up to a million.
    """
    if n > self._left:
      self._draw(max(n, _CHUNK))
    begin = self._chunk.shape[0] - self._left
    self._left -= n
    return self._chunk[begin : begin + n]

  def uniform(self, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
    """A float32 scalar, uniform in [low, high)."""
    return low + self.floats(1)[0] * (high - low)

  def integer(self, n: int | tf.Tensor) -> tf.Tensor:
    """An int32 scalar, uniform in [0, n), for n up to about a million."""
    return tf.cast(self.floats(1)[0] * tf.cast(n, tf.float32), tf.int32)

  def coin(self) -> tf.Tensor:
    """A bool scalar, true half of the time."""
    return self.floats(1)[0] < 0.5

  def seed(self) -> tf.Tensor:
    """An int32 of shape [2], to seed one stateless TensorFlow op."""
    return tf.cast(self.floats(2) * float(1 << _BITS), tf.int32)

  def _draw(self, n: int) -> None:
    seed = self.key
    if self._chunks:
      seed = tf.random.experimental.stateless_fold_in(seed, self._chunks)
    self._chunk = tf.random.stateless_uniform([n], seed)
    self._chunks, self._left = self._chunks + 1, n
