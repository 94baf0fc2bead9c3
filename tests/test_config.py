"""Arguments, defaults, and what a mistake in a config gets."""

import ml_collections
import pytest

from big_vision_dpn import config as config_lib
from big_vision_dpn.config import ConfigError


def _config(**fields):
  c = ml_collections.ConfigDict(
    {
      'total_steps': 10,
      'lr': 0.1,
      'input': {'data': {'name': 'x'}, 'batch_size': 8},
    },
    type_safe=False,
  )
  c.update(fields)
  return c


@pytest.mark.parametrize(
  ('arg', 'expected'),
  [
    (None, ('B/16', 0, False)),
    ('', ('B/16', 0, False)),
    ('S/16', ('S/16', 0, False)),
    ('runlocal', ('B/16', 0, True)),
    ('variant=Ti/16,seed=3', ('Ti/16', 3, False)),
    ('seed=3,runlocal', ('B/16', 3, True)),
    ('runlocal=False', ('B/16', 0, False)),
  ],
)
def test_parse_arg(arg, expected):
  parsed = config_lib.parse_arg(arg, variant='B/16', seed=0, runlocal=False)
  assert (parsed.variant, parsed.seed, parsed.runlocal) == expected


def test_parse_arg_converts_with_the_given_function():
  parsed = config_lib.parse_arg(
    'sizes=1-2', sizes=(None, lambda s: s.split('-'))
  )
  assert list(parsed.sizes) == ['1', '2']


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('varient=S', "unknown config argument 'varient'. Did you mean 'variant'"),
    ('seed=one', "seed='one'"),
    ('runlocal=maybe', 'expected True or False'),
  ],
)
def test_parse_arg_mistakes(arg, message):
  with pytest.raises(ConfigError, match=message):
    config_lib.parse_arg(arg, variant='B/16', seed=0, runlocal=False)


def test_resolve_fills_in_every_default():
  full = config_lib.resolve(_config())
  for name, field in config_lib.FIELDS.items():
    if field.default is config_lib.REQUIRED or field.duration:
      continue
    value = full
    for part in name.split('.'):
      value = value[part]
    expected = field.default
    if isinstance(value, ml_collections.ConfigDict):
      value = value.to_dict()
    assert value == expected, name
  assert full.log_training_steps == 50


def test_resolve_leaves_the_given_config_alone():
  config = _config()
  config_lib.resolve(config)
  assert 'seed' not in config


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'sead': 1}, "config.sead: unknown field 'sead'. Did you mean 'seed'"),
    ({'input': {'batchsize': 1}}, "Did you mean 'input.batch_size'"),
    ({'lr': 'high'}, "config.lr is 'high', of type str; expected int or float"),
    ({'seed': True}, 'config.seed is True, of type bool; expected int'),
    ({'total_epochs': 1}, 'give one of'),
  ],
)
def test_resolve_mistakes(fields, message):
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(_config(**fields))
  assert message in str(e.value)


def test_resolve_names_every_missing_field_at_once():
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(ml_collections.ConfigDict())
  for name in ('total_steps', 'lr', 'input.data', 'input.batch_size'):
    assert f'config.{name}' in str(e.value)


def test_fixed_differences():
  old = config_lib.to_jsonable(config_lib.resolve(_config()))
  new = config_lib.resolve(
    _config(lr=0.2, log_training_steps=1, evals={'a': {}}, seed=1)
  )
  differences = config_lib.fixed_differences(old, config_lib.to_jsonable(new))
  assert differences == ['lr: 0.1 there, 0.2 now', 'seed: 0 there, 1 now']


def test_a_folder_and_a_newer_field_do_not_stop_a_continued_run():
  old = config_lib.to_jsonable(config_lib.resolve(_config()))
  del old['input']['streams']
  new = _config()
  new.input.data.data_dir = '/elsewhere'
  new = config_lib.to_jsonable(config_lib.resolve(new))
  assert config_lib.fixed_differences(old, new) == []


def test_mistakes_collects_in_order_and_nests():
  outer = config_lib.Mistakes()
  with outer.of('a'):
    inner = config_lib.Mistakes()
    with inner.of('b'):
      raise ConfigError('one')
    with inner.of(''):
      raise ConfigError('two')
    inner.check()
  with outer.of('c'):
    pass
  with pytest.raises(ConfigError) as e:
    outer.check()
  assert e.value.messages == ('a: b: one', 'a: two')


def test_every_field_is_described():
  text = config_lib.describe_fields()
  assert all(name in text for name in config_lib.FIELDS)
