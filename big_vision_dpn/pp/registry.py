"""The table of pp ops, and the decorator that fills it.

An op is a factory: its arguments are those of the pp string, and what it
returns works on one example while the input pipeline is traced.

    @register('flip_lr', random=True, key='image')
    def flip_lr():
      def fn(image, rng):
        ...
      return fn

An op sees tensors, and works with TensorFlow. One on images is faster in NumPy:
see `pixels`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from big_vision_dpn.config import ConfigError, choose
from big_vision_dpn.pp.pixels import Pixels, to_tensor

Features = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Op:
  """One entry of the table.

  Attributes:
    name: what the pp string calls it.
    build: takes the arguments of the pp string (its signature is the one
      that they are checked against) and returns a function of the features,
      or of the features and an `Rng` if `random`, that returns the features.
    random: whether the op draws.
    place: file and line of the factory, for messages.
  """

  name: str
  build: Callable[..., Callable[..., Features]]
  random: bool
  place: str


OPS: dict[str, Op] = {}


def register(
  name: str,
  *,
  random: bool = False,
  key: str | None = None,
  pixels: bool = False,
) -> Callable[[Callable], Callable]:
  """Registers the decorated factory as the op `name`, and returns it as is.

  Args:
    name: the op's name in pp strings.
    random: the op's function takes an `Rng` as its second positional argument.
    key: if given, the op's function maps one tensor, the feature of this name,
      and the pp string may say otherwise by the keyword arguments `key` (read
      and write there), `inkey` (read there) and `outkey` (write there).
      If None, the function maps the whole dict of features.
    pixels: the op's function maps a `Pixels` in place of a tensor; with `key`.

  Raises:
    ConfigError: another factory has the name. Importing the same one again,
      say by `importlib.reload`, is no error.
  """

  def decorate(factory: Callable) -> Callable:
    code = inspect.unwrap(factory).__code__
    place = f'{code.co_filename}:{code.co_firstlineno}'
    if name in OPS and OPS[name].place != place:
      raise ConfigError(
        f'pp op {name!r} is registered twice: at {OPS[name].place} and at '
        f'{place}. Rename one of them.'
      )
    if key is None:
      build = _on_features(factory)
    else:
      build = _keyed(factory, key, Pixels.of if pixels else to_tensor)
    OPS[name] = Op(name, build, random, place)
    return factory

  return decorate


def lookup(name: str) -> Op:
  """The op `name`, or a ConfigError that names the nearest one."""
  return choose('pp op', name, OPS)


def _on_features(factory: Callable) -> Callable:
  """Makes the function of a factory see tensors only."""

  @functools.wraps(factory)
  def build(*args, **kwargs):
    fn = factory(*args, **kwargs)

    def apply(features: Features, *rng) -> Features:
      return fn({k: to_tensor(v) for k, v in features.items()}, *rng)

    return apply

  return build


def _keyed(factory: Callable, default: str, read: Callable) -> Callable:
  """Lifts a factory of functions of one value to functions of features."""

  @functools.wraps(factory)
  def build(*args, key=default, inkey=None, outkey=None, **kwargs):
    fn = factory(*args, **kwargs)

    def apply(features: Features, *rng) -> Features:
      value = fn(read(features[inkey or key]), *rng)
      return {**features, outkey or key: value}

    return apply

  build.__signature__ = _with_keys(inspect.signature(factory), default)
  return build


def _with_keys(signature: inspect.Signature, key: str) -> inspect.Signature:
  own = list(signature.parameters.values())
  # Keyword-only parameters stand before a **kwargs, if there is one.
  rest = [p for p in own if p.kind == inspect.Parameter.VAR_KEYWORD]
  added = [
    inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d)
    for n, d in (('key', key), ('inkey', None), ('outkey', None))
  ]
  return signature.replace(
    parameters=[p for p in own if p not in rest] + added + rest
  )
