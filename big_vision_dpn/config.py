"""Configs: their arguments, the documented list of fields, their validation.

A config file defines `get_config(arg=None)`, which returns a ConfigDict, as in
big_vision. `python -m big_vision_dpn.config` prints the list of fields.
"""

import contextlib
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_collections
from absl import logging

DURATION_UNITS = ('steps', 'examples', 'epochs', 'percent')


class ConfigError(ValueError):
  """Mistakes of the user's; each message says what was expected."""

  def __init__(self, *messages: str):
    super().__init__('\n'.join(messages))
    self.messages = messages


class Mistakes:
  """Collects ConfigErrors, so that one report has them all.

  mistakes = Mistakes()
  with mistakes.of('config.lr'):
    ...  # May raise ConfigError: it is noted, and the rest goes on.
  mistakes.check()  # Raises one ConfigError with all messages, if any.
  """

  def __init__(self):
    self.messages: list[str] = []

  @contextlib.contextmanager
  def of(self, where: str) -> Iterator[None]:
    """Notes an error of the `with` block, under `where` if not empty.

    One that is no ConfigError has its traceback logged: --verbosity=1 shows it.
    """
    prefix = f'{where}: ' if where else ''
    try:
      yield
    except ConfigError as e:
      self.messages += [prefix + message for message in e.messages]
    except Exception as e:  # A value that nobody has thought of.
      self.messages.append(f'{prefix}{type(e).__name__}: {e}')
      logging.debug('Traceback of: %s', e, exc_info=True)

  def check(self) -> None:
    """Raises a ConfigError with all that was noted, if anything was."""
    if self.messages:
      raise ConfigError(*self.messages)


def unknown(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
  """The error for a name outside its choices: the nearest one, then all."""
  choices = sorted(choices)
  near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return ConfigError(
    f'unknown {kind} {name!r}.{hint} Choices: {", ".join(choices) or "none"}.'
  )


def choose(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
  """`choices[name]`, or a ConfigError that names the nearest choice."""
  if name not in choices:
    raise unknown(kind, name, choices)
  return choices[name]


def check_arguments(
  what: str, fn: Callable, names: Iterable[str], reserved: Iterable[str] = ()
) -> None:
  """Raises ConfigError unless `fn` takes every keyword argument in `names`.

  Args:
    what: how the message calls the function, e.g. "op randaug".
    fn: the function or class whose signature decides.
    names: the keyword arguments that a config gives.
    reserved: parameters that our code fills in, so a config may not.
  """
  parameters = inspect.signature(fn).parameters.values()
  if any(p.kind == p.VAR_KEYWORD for p in parameters):
    return
  by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY)  # fmt: skip
  allowed = {p.name for p in parameters if p.kind in by_keyword}
  for name in names:
    if name not in allowed - set(reserved):
      raise unknown(f'argument of {what}', name, allowed - set(reserved))


def parse_arg(arg: str | None, **spec: Any) -> ml_collections.ConfigDict:
  """Parses the part of `--config file.py:ARG` behind the colon.

  As big_vision's function of that name: `key=value` pairs between commas; a
  key alone is a flag set to True; a single value without a key belongs to the
  first argument of `spec`.

  Args:
    arg: the text, e.g. "variant=Ti/16,runlocal"; None is the empty text.
    **spec: name=default for every argument; the default's type converts the
      text. A (default, function) pair converts with the function.

  Returns:
    A ConfigDict with one entry for each of `spec`.

  Raises:
    ConfigError: an unknown argument, or a value that does not convert.
  """
  spec = {
    k: v if isinstance(v, tuple) else (v, type(v)) for k, v in spec.items()
  }
  arg = arg or ''
  if arg and ',' not in arg and '=' not in arg and arg not in spec:
    arg = f'{next(iter(spec))}={arg}'
  values = ml_collections.ConfigDict(
    {name: default for name, (default, _) in spec.items()}, type_safe=False
  )
  for pair in filter(None, arg.split(',')):
    name, _, text = pair.partition('=')
    _, convert = choose('config argument', name, spec)
    text = text if '=' in pair else 'True'
    try:
      values[name] = _to_bool(text) if convert is bool else convert(text)
    except ValueError as e:
      raise ConfigError(f'config argument {name}={text!r}: {e}') from e
  return values


def _to_bool(text: str) -> bool:
  if text.lower() not in ('true', 'false', '1', '0', 'yes', 'no'):
    raise ValueError('expected True or False')
  return text.lower() in ('true', '1', 'yes')


REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of the config.

  Attributes:
    type: the types that a value may have.
    default: the value when the config leaves the field out, or REQUIRED.
    doc: what it means, with its unit.
    duration: the field is written with a unit: NAME_steps, NAME_examples,
      NAME_epochs or NAME_percent (0 to 1 of the run); one of them at most.
    fixed: continuing a run with another value would change its result.
    minimum: the smallest value that is allowed.
  """

  type: Any
  default: Any
  doc: str
  duration: bool = False
  fixed: bool = True
  minimum: float | None = None


_NUMBER = (int, float)
_LIST = (list, tuple)
_DICT = (ml_collections.ConfigDict, dict)
_TEXT = str

FIELDS: dict[str, Field] = {
  'task': Field(_TEXT, 'classification', 'kind of training, in tasks/'),
  'seed': Field(int, 0, 'of initialisation, data order, augmentation, dropout'),
  'total': Field(_NUMBER, REQUIRED, 'length of the run', duration=True),
  'num_classes': Field(int, None, "width of the model's head"),
  'loss': Field(_TEXT, 'sigmoid_xent', 'a function of losses.py'),
  'input.data': Field(
    _DICT,
    REQUIRED,
    'name and split of the data set, and its other arguments; or, to mix data'
    ' sets, weights by names, and input.NAME with the data, pp and other fields'
    ' of each',
  ),
  'input.pp': Field(_TEXT, '', 'preprocessing: ops of pp/, joined by |'),
  'input.batch_size': Field(
    int, REQUIRED, 'examples in a global batch', minimum=1
  ),
  'input.shuffle_buffer_size': Field(
    int,
    50_000,
    'examples, over all streams, among which a large split is shuffled; twice'
    ' as many are in memory, undecoded, over all hosts',
    minimum=1,
  ),
  'input.pre_filter_fn': Field(
    Callable, None, 'of the raw features: whether the example counts'
  ),
  'input.skip_errors': Field(
    bool,
    False,
    'report an example that cannot be read, and take another one in its place',
  ),
  'input.cache_raw': Field(
    bool,
    False,
    'hold the undecoded split in memory, however large it is',
  ),
  'input.cache_final': Field(
    bool,
    False,
    'hold the preprocessed split in memory; for a pp without random ops',
  ),
  'input.streams': Field(
    int,
    64,
    'parts, independent of hosts, in which a large split is read',
    minimum=1,
  ),
  'input.max_in_memory_gb': Field(
    _NUMBER,
    2.0,
    'raw size (10^9 bytes) up to which a split of TFRecord files is held in'
    ' memory and shuffled whole',
  ),
  'input.threads': Field(
    int,
    None,
    'threads that preprocess; None: as many as cores',
    fixed=False,
    minimum=1,
  ),
  'input.prefetch': Field(
    int,
    2,
    'batches prepared ahead, on the host and on the device',
    fixed=False,
    minimum=1,
  ),
  'pp_modules': Field(
    _LIST,
    ('ops_general', 'ops_image', 'randaug'),
    'modules that define pp ops: of pp/, or dotted names of your own',
  ),
  'model_name': Field(_TEXT, 'vit', 'a module of models/'),
  'model': Field(_DICT, {}, "the model's own arguments"),
  'model_init': Field(
    _TEXT,
    None,
    'weights to start from: a .npz or .safetensors (local, gs://, https://), a'
    ' WORKDIR, WORKDIR/checkpoints/STEP; behind a colon the part that is meant,'
    ' as in siglip.npz:img',
  ),
  'model_load': Field(
    _DICT,
    {},
    "arguments of the model module's load(): dont_load, and for vit"
    ' resize_patch, posemb_grid, posemb_antialias',
  ),
  'init_head_bias': Field(_NUMBER, None, "first value of the head's bias"),
  'optax_name': Field(_TEXT, 'scale_by_adam', 'the optimizer, of optim.py'),
  'optax': Field(_DICT, {}, "the optimizer's arguments"),
  'lr': Field(_NUMBER, REQUIRED, 'learning rate, before lr_mults and schedule'),
  'lr_layer_decay': Field(
    _NUMBER,
    None,
    "factor of the learning rate from one block to the one before it: the last"
    " block has it once, the embeddings once more than the first block",
  ),
  'lr_mults': Field(_LIST, (), '(regex of parameter names, multiplier) pairs'),
  'wd': Field(_NUMBER, None, 'weight decay; decoupled, not multiplied by lr'),
  'wd_mults': Field(
    _LIST,
    (('.*/kernel$', 1.0),),
    '(regex, multiplier) pairs; a parameter that none matches has no decay',
  ),
  'schedule': Field(
    (*_DICT, *_LIST),
    {},
    "the learning rate's course: decay_type, warmup_steps, …; or a list of"
    ' (regex, course), None to freeze',
  ),
  'grad_clip_norm': Field(_NUMBER, None, 'largest global norm of gradients'),
  'grad_accum_steps': Field(
    int,
    1,
    'parts of a batch that are computed one after another, to save memory',
    minimum=1,
  ),
  'nan_policy': Field(
    _TEXT,
    'stop',
    "what to do when a step's loss or gradients are not finite: stop the run,"
    ' or skip the update and count it',
  ),
  'ema_decay': Field(
    _NUMBER,
    None,
    'of an average of the parameters over the steps, which is evaluated too, as'
    ' ema/NAME/…',
  ),
  'mesh': Field(
    _LIST,
    (('data', -1),),
    '(axis, devices) pairs, the devices of all hosts; -1 for the rest',
    fixed=False,
  ),
  'sharding_strategy': Field(
    _LIST,
    (('.*', 'replicate'),),
    '(regex of parameter names, strategy) pairs: replicate, fsdp(axis="data"),'
    ' tensor_parallel(axis="model"), shard_dim(axis, dim), joined by |; what'
    ' belongs to a parameter follows it',
    fixed=False,
  ),
  'sharding_rules': Field(
    _LIST,
    (('act_batch', 'data'),),
    '(axis of activations, axis of the mesh) pairs: act_batch, act_len,'
    ' act_emb, act_heads, act_mlp',
    fixed=False,
  ),
  'mixup': Field(_DICT, None, 'p: the Beta distribution of mixup has (p, p)'),
  'evals': Field(
    _DICT,
    {},
    'evaluators by name: type, data, pp_fn, log_steps, …',
    fixed=False,
  ),
  'log_training': Field(
    _NUMBER, 50, 'how often metrics are written', duration=True, fixed=False
  ),
  'ckpt': Field(
    _NUMBER, 1000, 'how often a checkpoint is saved', duration=True, fixed=False
  ),
  'keep_ckpt': Field(
    _NUMBER, None, 'checkpoints kept for ever', duration=True, fixed=False
  ),
  'profile_steps': Field(
    _LIST, None, '(first, last) step of a profiler trace', fixed=False
  ),
  'comparison': Field(
    _DICT,
    None,
    'trains variants in turn: runs (a list of name, fields that differ), metric'
    ' (shown as the result), next_steps (text printed at the end)',
    fixed=False,
  ),
}  # fmt: skip

_SECTIONS = {name.split('.')[0] for name in FIELDS if '.' in name}

# Fields of `input` that each data set of a mix has its own of.
PER_DATA_SET = (
  'data',
  'pp',
  'shuffle_buffer_size',
  'pre_filter_fn',
  'skip_errors',
  'cache_raw',
  'cache_final',
)


def mixed_names(config: Mapping[str, Any]) -> list[str]:
  """The data sets to which `input.data` gives weights; [] if it is one."""
  data = (config.get('input') or {}).get('data') or {}
  if not all(isinstance(weight, _NUMBER) for weight in data.values()):
    return []
  return list(data)


def _fields(config: Mapping[str, Any]) -> dict[str, Field]:
  """FIELDS, as this config has them: with those of each data set of a mix."""
  names = mixed_names(config)
  if not names:
    return FIELDS
  own = {f: FIELDS[f'input.{f}'] for f in PER_DATA_SET}
  general = {
    name: field
    for name, field in FIELDS.items()
    if name == 'input.data' or name.removeprefix('input.') not in own
  }
  return general | {
    f'input.{name}.{f}': field for name in names for f, field in own.items()
  }


def _accepted_keys(
  fields: Mapping[str, Field],
) -> dict[str, tuple[str, Field]]:
  """Every key that a config may have -> (its field, the field)."""
  keys = {}
  for name, field in fields.items():
    units = [f'_{u}' for u in DURATION_UNITS] if field.duration else ['']
    keys |= {name + unit: (name, field) for unit in units}
  return keys


def _flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config's fields by their dotted names."""
  sections = {*_SECTIONS, *(f'input.{n}' for n in mixed_names(config))}

  def flatten(prefix, section):
    flat = {}
    for key, value in section.items():
      inside = f'{prefix}{key}' in sections and isinstance(value, _DICT)
      flat |= (
        flatten(f'{prefix}{key}.', value)
        if inside
        else {f'{prefix}{key}': value}
      )
    return flat

  return flatten('', config)


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The full config, a copy: checked for keys and types, with the defaults.

  Raises:
    ConfigError: unknown, missing or mistyped fields, each with a message.
  """
  fields, flat, wrong = _fields(config), _flatten(config), []
  keys = _accepted_keys(fields)
  given: dict[str, list[str]] = {name: [] for name in fields}
  for key, value in flat.items():
    if key not in keys:
      wrong.append(f'config.{key}: {unknown("field", key, keys)}')
      continue
    name, field = keys[key]
    if value is None:
      continue
    given[name].append(key)
    if not _has_type(value, field.type):
      wrong.append(
        f'config.{key} is {value!r}, of type {type(value).__name__};'
        f' expected {_type_names(field.type)}: {field.doc}'
      )
    elif field.minimum is not None and value < field.minimum:
      wrong.append(
        f'config.{key} is {value!r}; expected at least {field.minimum}'
      )
  full = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
  for name, field in fields.items():
    if len(given[name]) > 1:
      wrong.append(f'config: give one of {", ".join(given[name])}, not several')
    if given[name]:
      continue
    if field.default is REQUIRED:
      unit = '_steps (or _examples, _epochs)' if field.duration else ''
      wrong.append(f'config.{name}{unit} is missing: {field.doc}')
    elif not field.duration:
      _set(full, name, field.default)
    elif field.default is not None:
      full[f'{name}_steps'] = field.default
  if wrong:
    raise ConfigError(*wrong)
  return full


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
  *section, key = name.split('.')
  for part in section:
    if part not in config:
      config[part] = ml_collections.ConfigDict()
    config = config[part]
  config[key] = value


def _has_type(value: Any, types: Any) -> bool:
  types = types if isinstance(types, tuple) else (types,)
  return isinstance(value, types) and (
    not isinstance(value, bool) or bool in types
  )


def _type_names(types: Any) -> str:
  types = types if isinstance(types, tuple) else (types,)
  return ' or '.join(t.__name__ for t in types)


def to_jsonable(config: Any) -> Any:
  """The config as JSON's types, so that it can be written and compared."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {k: to_jsonable(v) for k, v in sorted(config.items())}
  if isinstance(config, list | tuple):
    return [to_jsonable(v) for v in config]
  if config is None or isinstance(config, bool | int | float | str):
    return config
  return getattr(config, '__name__', str(config))  # E.g. of jnp.bfloat16.


def fixed_differences(old: Mapping, new: Mapping) -> list[str]:
  """Fields that a continued run must not change, but which differ.

  Args:
    old: the `to_jsonable` config with which the run was started.
    new: the one with which it is to go on.

  Returns:
    One line a difference: name, old value, new value.
  """
  keys = _accepted_keys(_fields(new))
  flat = lambda c: _flatten(ml_collections.ConfigDict(c))
  old, new = flat(old), flat(new)
  differences = []
  for key in sorted(old.keys() | new.keys()):
    if key in keys and not keys[key][1].fixed:
      continue
    before, after = (to_jsonable(c.get(key)) for c in (old, new))
    if key not in old and key in keys:  # Newer than that run.
      before = to_jsonable(keys[key][1].default)
    if key.endswith('.data'):  # Where it lies may differ between machines.
      here = {'data_dir': None, 'fname': None}
      before, after = ({**d, **here} for d in (before, after))
    if before != after:
      differences.append(f'{key}: {before!r} there, {after!r} now')
  return differences


def describe_fields() -> str:
  """The list of fields, as text for a terminal."""
  lines = []
  for name, field in FIELDS.items():
    unit = '_{steps,examples,epochs,percent}' if field.duration else ''
    default = (
      'required' if field.default is REQUIRED else f'default {field.default!r}'
    )
    lines += [f'{name}{unit} ({default})', textwrap.indent(field.doc, '    ')]
  return '\n'.join(lines)


if __name__ == '__main__':
  print(describe_fields())
