"""Ops that choose some of the entries of features at random."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.registry import Features, register
from big_vision_dpn.pp.rng import Rng


def check_keys(name: str, keys: Any) -> list[str]:
  """An argument that names features, as a list; one may stand alone.

  Raises:
    ConfigError: it names none, or something in it is no string.
  """
  listed = [keys] if isinstance(keys, str) else keys
  if (
    not isinstance(listed, list | tuple)
    or not listed
    or not all(isinstance(key, str) for key in listed)
  ):
    raise ConfigError(
      f"{name} is {keys!r}; expected a feature's name, or a list such as"
      ' ["a", "b"]'
    )
  return list(listed)


@register('choice', random=True)
def choice(
  n: int | str | Sequence[int] = 'single',
  key: str | Sequence[str] | None = None,
  fewer_ok: bool = False,
  inkey: str | Sequence[str] | None = None,
  outkey: str | Sequence[str] | None = None,
) -> Callable[[Features, Rng], Features]:
  """Chooses entries at random along the first axis, each at most once.

  Every entry is as likely as any other. Those chosen keep their order, and are
  the same for all features that are named.

  Args:
    n: how many. "single" is one, without the axis: [m, ...] becomes [...]. A
      number gives [n, ...]. A pair (low, high) draws the number, both included,
      and gives [None, ...].
    key: the feature to read and write, or a list of features, which have as
      many entries.
    fewer_ok: if there are fewer than `n` (or than `low`), take all of them,
      and leave the size of the axis unknown. "single" needs one in any case.
    inkey: the feature or features to read, in place of `key`.
    outkey: as many to write; "{key}" in it stands for the one read.

  The function raises InvalidArgumentError at run time if there are too few
  entries, or if the features differ in their number.
  """
  pairs = _pairs(key, inkey, outkey)
  low, high = _bounds(n)

  def fn(features: Features, rng: Rng) -> Features:
    least = 0 if fewer_ok and n != 'single' else low
    size = _entries(features, [i for i, _ in pairs], least)
    if n == 'single':
      return _take(features, pairs, rng.integer(size))
    number = low if low == high else low + rng.integer(high - low + 1)
    order = tf.random.experimental.stateless_shuffle(tf.range(size), rng.seed())
    chosen = tf.sort(order[:number])
    if low == high and not fewer_ok:
      chosen = tf.ensure_shape(chosen, [low])
    return _take(features, pairs, chosen)

  return fn


@register('choice_no_replacement', random=True)
def choice_no_replacement(
  key: str | Sequence[str] | None = None,
  inkey: str | Sequence[str] | None = None,
  outkey: str | Sequence[str] | None = None,
) -> Callable[[Features, Rng], Features]:
  """Chooses one entry, another one each epoch until all have had their turn.

  For small data sets. In the m epochs from a multiple of m on, an example with
  m entries gives each of them once, in an order of its own; then in another
  order. [m, ...] becomes [...].

  The choice is a function of the seed, the example and the epoch. big_vision
  counts in memory how often it has seen each `_id`, and so begins anew where
  a run is continued; this needs neither.

  Args:
    key: as for `choice`.
    inkey: as for `choice`.
    outkey: as for `choice`.

  The function raises InvalidArgumentError at run time if there are no entries,
  or if the features differ in their number.
  """
  pairs = _pairs(key, inkey, outkey)
  # So that two of these ops, on other features, choose independently.
  salt = zlib.crc32(repr(pairs).encode())

  def fn(features: Features, rng: Rng) -> Features:
    size = _entries(features, [i for i, _ in pairs], 1)
    epoch, seed = _epoch_and_seed(rng)
    many = tf.cast(size, tf.int64)
    for value in (salt, epoch // many):
      seed = tf.random.experimental.stateless_fold_in(seed, value)
    order = tf.random.experimental.stateless_shuffle(tf.range(size), seed)
    return _take(features, pairs, order[epoch % many])

  return fn


def _epoch_and_seed(rng: Rng) -> tuple[tf.Tensor, tf.Tensor]:
  """The epoch, int64, and an int64[2] seed that is the same in every epoch.

  The parts of `input_pipeline.example_key`.
  """
  key = tf.cast(rng.key, tf.int64)
  return key[0] // 2**32, tf.stack([key[0] % 2**32, key[1]])


def _pairs(key: Any, inkey: Any, outkey: Any) -> list[tuple[str, str]]:
  """(feature to read, feature to write), as the three arguments say."""
  for name, value in (('inkey', inkey), ('outkey', outkey)):
    if value is None and key is None:
      raise ConfigError(
        f'expected key="…", the feature to read and write, or inkey="…" and'
        f' outkey="…"; {name} is missing'
      )
  sources = check_keys('inkey or key', inkey or key)
  targets = check_keys('outkey or key', outkey or key)
  if len(sources) != len(targets):
    raise ConfigError(
      f'reads {sources} and writes {targets}; expected as many of both'
    )
  return [
    (source, target.replace('{key}', source))
    for source, target in zip(sources, targets, strict=True)
  ]


def _bounds(n: Any) -> tuple[int, int]:
  if n == 'single':
    return 1, 1
  low, high = n if isinstance(n, list | tuple) and len(n) == 2 else (n, n)
  if type(low) is not int or type(high) is not int or not 0 <= low <= high:
    raise ConfigError(
      f'n is {n!r}; expected "single", a number, or a pair (low, high)'
    )
  return low, high


def _entries(features: Features, keys: list[str], least: int) -> tf.Tensor:
  """The number of entries, which all have; checked when there is data."""
  sizes = [tf.shape(features[key])[0] for key in keys]
  checks = [
    tf.debugging.assert_equal(
      size, sizes[0], f'{key!r} has not as many entries as {keys[0]!r}'
    )
    for key, size in zip(keys, sizes, strict=True)
  ]
  checks.append(
    tf.debugging.assert_greater_equal(
      sizes[0], least, f'{keys[0]!r} has too few entries to choose from'
    )
  )
  with tf.control_dependencies([c for c in checks if c is not None]):
    return tf.identity(sizes[0])


def _take(
  features: Features, pairs: list[tuple[str, str]], places: tf.Tensor
) -> Features:
  taken = {to: tf.gather(features[of], places) for of, to in pairs}
  return {**features, **taken}
