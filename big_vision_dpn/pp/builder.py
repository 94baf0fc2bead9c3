"""Turns a pp string into a function of one example.

A pp string is a chain of ops, applied from left to right:

    decode|resize(224)|flip_lr|value_range(-1, 1)|keep("image", "labels")

It is read by Python's own parser, so arguments are Python literals, and quotes
or bars inside of them mean nothing special.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf

from big_vision_dpn import config
from big_vision_dpn import pp as package
from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp import deferred, registry
from big_vision_dpn.pp.pixels import to_tensor
from big_vision_dpn.pp.rng import Rng

# Modules of ours that big_vision's configs call by another name.
_ALIASES = {'archive.randaug': 'randaug'}
_QUOTED = re.compile(r"""(["'])(?:\\.|(?!\1).)*\1""")
_NOT_OPS = ('builder', 'deferred', 'pixels', 'registry', 'resample', 'rng')


@dataclasses.dataclass(frozen=True)
class _Step:
  where: str
  fn: Callable[..., registry.Features]
  random: bool


def import_ops(modules: Iterable[str]) -> None:
  """Imports the modules that register ops, as `config.pp_modules` names them.

  Args:
    modules: a bare name is a module of `big_vision_dpn.pp`; a dotted name is
      any importable module, so that a user brings ops of their own.

  Raises:
    ConfigError: a module does not import; the message names it and says why.
  """
  for name in modules:
    name = _ALIASES.get(name, name)
    if '.' not in name:
      ours = {m.name for m in pkgutil.iter_modules(package.__path__)}
      if name not in ours:
        raise config.unknown('module in pp_modules', name, ours - {*_NOT_OPS})
    path = name if '.' in name else f'{package.__name__}.{name}'
    try:
      importlib.import_module(path)
    except Exception as e:
      raise ConfigError(
        f'pp_modules: {path} does not import: {type(e).__name__}: {e}'
      ) from e


class Preprocess:
  """What a pp string describes: a part for the host, and one for the device.

  The host's part is made for tracing by `tf.data`, example by example:

      preprocess = get_preprocess_fn(pp)
      data = data.map(lambda x, seed: preprocess(x, seed)).batch(64)

  The device's part is for batches of that, within `jax.jit` or not:

      batch = preprocess.on_device(batch)

  It does what the last ops of the string leave to it: `value_range` on a uint8
  image, which so crosses to the device with a quarter of the bytes. What the
  ops mean does not depend on which part they are in.

  Attributes:
    random: whether an op draws.
  """

  def __init__(self, steps: list[_Step], defer: bool):
    self._steps = steps
    self._defer = defer
    self.random = any(step.random for step in steps)
    self._on_device: dict[str, deferred.DeviceFn] | None = None

  def __call__(
    self, features: registry.Features, seed: tf.Tensor
  ) -> registry.Features:
    """The host's part, for one example.

    It is not converted by AutoGraph: an op that branches on a tensor does so by
    `tf.cond`.

    Args:
      features: the example's tensors by name; the dict is not changed.
      seed: the example's own, int32 or int64 of shape [2].

    Returns:
      The features for the device's part, the same for the same arguments.

    Raises:
      ConfigError: while it is traced, if the features lack what an op reads.
    """
    # So that ops see plain Python, in tf.data as in eager mode.
    run = tf.autograph.experimental.do_not_convert(self._on_host)
    return run(features, seed)

  def on_device(self, batch: registry.Features) -> registry.Features:
    """The device's part, for a batch.

    Args:
      batch: features by name, jax arrays with a leading axis for the examples;
        those that the host's part does not make stay. The dict is not changed.

    Returns:
      The batch as the pp string describes it. Only after the host's part was
      traced is it known what is left to do.
    """
    assert self._on_device is not None, (
      'on_device before the host part was traced: iterate the data set first, '
      'or take its element_spec'
    )
    done = {n: fn(batch[n]) for n, fn in self._on_device.items() if n in batch}
    return {**batch, **done}

  def _on_host(
    self, features: registry.Features, seed: tf.Tensor
  ) -> registry.Features:
    rng = Rng(seed) if self.random else None
    features = dict(features)
    with deferred.noting() as replace:
      for step in self._steps:
        features = _run(step, features, rng)
      features = {name: to_tensor(v) for name, v in features.items()}
      self._on_device = replace(features) if self._defer else {}
    return features


def get_preprocess_fn(pp: str, *, defer: bool = True) -> Preprocess:
  """The function that a pp string describes.

  Call `import_ops` before.

  Args:
    pp: the ops, divided by bars; "" is the identity.
    defer: leave to the device what it can do; False does all on the host.

  Returns:
    A function of (features, seed), and what it leaves to the device.

  Raises:
    ConfigError: a mistake in the string; the message has the number of the op,
      its column and what was expected.
  """
  return Preprocess([_bind(*found) for found in _parse(pp)], defer)


def split_ops(pp: str) -> list[str]:
  """The ops of a pp string as text, one by one; raises as above."""
  return [ast.unparse(node) for _, _, node in _parse(pp)]


def _run(
  step: _Step, features: registry.Features, rng: Rng | None
) -> registry.Features:
  try:
    return step.fn(dict(features), *([rng] if step.random else []))
  except ConfigError as e:
    raise _failure(step, e) from e
  except Exception as e:
    if isinstance(e, KeyError) and e.args and e.args[0] not in features:
      problem = config.unknown('feature', e.args[0], features)
      raise _failure(step, problem) from e
    raise _failure(step, f'{type(e).__name__}: {e}') from e


def _failure(step: _Step, problem: Exception | str) -> ConfigError:
  error = ConfigError(f'{step.where}: {problem}')
  # Without this mark AutoGraph, if it converts the caller, raises an error of
  # a type of its own.
  error.ag_pass_through = True
  return error


class _Text:
  """A pp string, and the columns of its parts as a reader counts them."""

  def __init__(self, pp: str):
    self.pp = pp
    # The parser takes an indent or a second line for a mistake. Neither change
    # here moves a column but the strip, which `column` makes up for.
    self.code = pp.replace('\n', ' ').strip()
    self.indent = len(pp) - len(pp.lstrip())

  def column(self, node: ast.AST) -> int:
    # The parser counts bytes.
    before = self.code.encode()[: node.col_offset]
    return self.indent + len(before.decode()) + 1

  def where(self, number: int, name: str, column: int) -> str:
    name = f' ({name})' if name else ''
    return f'pp op {number}{name}, column {column} of {self.pp!r}'


def _parse(pp: str) -> Iterator[tuple[_Text, int, ast.expr]]:
  """Yields every op: its text, its number from 1, and its node."""
  if not isinstance(pp, str):
    raise ConfigError(f'expected a pp string, got {pp!r}')
  text = _Text(pp)
  if not text.code:
    return
  # Quoted parts are blanked with as many characters, to keep the columns.
  bare = _QUOTED.sub(lambda m: '_' * len(m[0]), text.code)
  try:
    body = _tree(text.code, bare)
  except (SyntaxError, ValueError) as e:
    offset = (getattr(e, 'offset', None) or 1) - 1
    number = bare[:offset].count('|') + 1
    where = text.where(number, '', text.indent + offset + 1)
    raise ConfigError(
      f'{where}: {getattr(e, "msg", e)}; expected ops such as flip_lr or '
      'resize(224), with one bar between two'
    ) from e
  for number, node in enumerate(_flatten(body), 1):
    yield text, number, node


def _tree(code: str, bare: str) -> ast.expr:
  """Parses; finds by itself what Python would word badly, or not mind."""
  empty = re.search(r'^\||\|(?=\s*(\||$))', bare)
  if empty:
    offset = empty.end() + (1 if empty.start() else 0)
    raise SyntaxError('an op is empty', ('', 1, offset, code))
  if '#' in bare:
    # To Python it starts a comment, which would drop the rest of the ops.
    raise SyntaxError('unexpected #', ('', 1, bare.index('#') + 1, code))
  return ast.parse(code, mode='eval').body


def _flatten(node: ast.expr) -> list[ast.expr]:
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return _flatten(node.left) + _flatten(node.right)
  return [node]


def _bind(text: _Text, number: int, node: ast.expr) -> _Step:
  """Makes the op of one node, with its arguments checked."""
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  if not isinstance(call.func, ast.Name):
    raise ConfigError(
      f'{text.where(number, "", text.column(node))}: expected an op such as '
      f'flip_lr or resize(224), got {ast.unparse(node)}'
    )
  name = call.func.id
  where = text.where(number, name, text.column(node))
  args = [_literal(text, number, name, a) for a in call.args]
  kwargs = {}
  for k in call.keywords:
    if k.arg in kwargs:
      raise ConfigError(f'{where}: argument {k.arg!r} is given twice')
    if k.arg is None:
      raise ConfigError(f'{where}: expected name=value, got {ast.unparse(k)}')
    kwargs[k.arg] = _literal(text, number, name, k.value)
  try:
    op = registry.lookup(name)
    return _Step(where, _build(op, args, kwargs), op.random)
  except ConfigError as e:
    raise ConfigError(f'{where}: {e}') from e


def _build(op: registry.Op, args: list, kwargs: dict) -> Callable:
  config.check_arguments(f'op {op.name}', op.build, kwargs)
  signature = _plain(inspect.signature(op.build))
  try:
    signature.bind(*args, **kwargs)
    return op.build(*args, **kwargs)
  except ConfigError:
    raise
  except (TypeError, ValueError) as e:
    raise ConfigError(f'{e}; expected {op.name}{signature}') from e


def _plain(signature: inspect.Signature) -> inspect.Signature:
  """The signature without its types, for messages."""
  empty = inspect.Parameter.empty
  parameters = signature.parameters.values()
  return inspect.Signature([p.replace(annotation=empty) for p in parameters])


def _literal(text: _Text, number: int, name: str, node: ast.expr):
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError) as e:
    raise ConfigError(
      f'{text.where(number, name, text.column(node))}: expected a literal '
      '(a number, a quoted string, True, False, None, a tuple or a list), '
      f'got {ast.unparse(node)}'
    ) from e
