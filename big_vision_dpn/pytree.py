"""Trees of parameters, and regular expressions over their names."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from big_vision_dpn.config import ConfigError


def path_name(path: tuple) -> str:
  """A leaf's name, its keys joined by "/", e.g. "head/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten_with_names(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their names, in the tree's order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in leaves}


def map_with_names(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """`fn(name, leaf)` for every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(path_name(path), leaf), tree
  )


def first_match(
  what: str,
  tree: Any,
  patterns: Sequence[tuple[str, Any]],
  default: Any = None,
) -> dict[str, Any]:
  """For every parameter the value of the first pattern that matches its name.

  As in big_vision, a pattern must match the whole name.

  Args:
    what: the config field that holds the patterns, for messages.
    tree: of arrays or shapes.
    patterns: (regular expression, value) pairs.
    default: the value of a parameter that no pattern matches.

  Returns:
    The values by parameter name.

  Raises:
    ConfigError: a pattern that is no regular expression or matches nothing.
  """
  names = list(flatten_with_names(tree))
  compiled = []
  for pair in patterns:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
      raise ConfigError(
        f'config.{what}: expected a list of (regex, value) pairs, not {pair!r}'
      )
    pattern, value = pair
    try:
      regex = re.compile(pattern)
    except re.error as e:
      raise ConfigError(f'config.{what}: {pattern!r}: {e}') from e
    if not any(map(regex.fullmatch, names)):
      raise ConfigError(
        f'config.{what}: {pattern!r} matches none of the parameters'
        f' {", ".join(names)}'
      )
    compiled.append((regex, value))
  return {
    name: next((v for r, v in compiled if r.fullmatch(name)), default)
    for name in names
  }


def eval_shape(fn: Callable, state: Any, batch: Mapping[str, Any]) -> Any:
  """The shapes that `fn(state, batch)` returns, without computing anything.

  Args:
    fn: traceable.
    state: of arrays or their shapes: parameters, or a random key.
    batch: of jax.ShapeDtypeStructs.

  Raises:
    ConfigError: `fn` cannot take such a batch.
  """
  try:
    return jax.eval_shape(fn, state, batch)
  except ConfigError:
    raise
  except Exception as e:  # Of flax, of jax, of a user's own function.
    shapes = ', '.join(f'{k} {list(v.shape)}' for k, v in batch.items())
    raise ConfigError(
      f'fails on batches of {shapes}: {type(e).__name__}: {e}'
    ) from e


def l2_norm(tree: Any) -> jax.Array:
  """The euclidean norm of all leaves together, a float32 scalar."""
  squares = (jax.numpy.sum(jax.numpy.square(x)) for x in jax.tree.leaves(tree))
  return jax.numpy.sqrt(sum(squares))
