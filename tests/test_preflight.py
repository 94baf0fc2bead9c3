"""What is found wrong with training data before anything is compiled."""

import ml_collections
import pytest
import tensorflow as tf

from big_vision_dpn import preflight

PP = (
  'decode|resize(8)|value_range(-1, 1)'
  '|onehot(10, key="label", key_result="labels")|keep("image", "labels")'
)
RANDOM_PP = PP.replace('|value_range', '|flip_lr|value_range')


def _data(split='train[:100]', **options):
  data = dict(name='bv:mnist5k', split=split)
  return {'data': data, 'pp': PP, **options}


def _config(**fields):
  return ml_collections.ConfigDict(
    {
      'total_epochs': 2,
      'lr': 0.1,
      'num_classes': 10,
      'model': dict(width=16, depth=1, num_heads=2, patch_size=4),
      **fields,
      'input': {'batch_size': 16, **fields['input']},
    }
  )


def _mix(**parts):
  return {'data': dict(a=3, b=1), 'a': _data(), 'b': _data('test'), **parts}


def _check(**fields):
  return preflight.check(_config(**fields))


def test_the_data_sets_of_a_mix_add_up():
  plan = _check(input=_mix())
  assert not plan.mistakes.messages
  assert plan.num_examples == 100 + 1000
  assert plan.total_steps == round(2 * 1100 / 16)
  assert [p.weight for p in plan.parts] == [3, 1]
  assert 'mnist5k train[:100] + mnist5k test' in preflight.summary(plan, 1.0)
  assert plan.host_shapes['image'].dtype == 'float32'


def test_a_data_set_of_weight_zero_is_left_out():
  plan = _check(input=_mix(data=dict(a=1, b=0)))
  assert [p.source.name for p in plan.parts] == ['mnist5k train[:100]']


def test_uint8_leaves_the_host():
  plan = _check(input=_data())
  assert not plan.mistakes.messages
  assert plan.host_shapes['image'].dtype == 'uint8'
  assert plan.batch_shapes['image'].dtype == 'float32'


def test_a_filter_counts():
  keep = lambda features: features['label'] < 3
  plan = _check(input=_data(pre_filter_fn=keep))
  assert plan.num_examples == 30  # The classes alternate.
  keep = lambda features: features['label'] < 0
  plan = _check(input=_data(pre_filter_fn=keep))
  assert plan.mistakes.messages[0] == (
    'config.input.pre_filter_fn: leaves no example'
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (_mix(pp=PP), "config.input.pp: unknown field 'input.pp'"),
    (
      _mix(b=_data(shufle_buffer_size=3)),
      "Did you mean 'input.b.shuffle_buffer_size'?",
    ),
    (_mix(b={'pp': PP}), 'config.input.b.data is missing'),
    (_mix(data=dict(a=1, b=1, c=1)), 'config.input.c.data is missing'),
    (_mix(data=dict(a=99, b=1)), 'a batch of 16 has no row for the smallest'),
    (_mix(data=dict(a=2, b=-1)), 'expected positive numbers'),
    (
      _mix(b=_data(pp=PP.replace('resize(8)', 'resize(12)'))),
      "must give the same features: 'image' is",
    ),
    (_mix(b=_data(pp='decode|no_op')), "config.input.b.pp: pp op 2 (no_op)"),
    (_mix(b=_data(split='no')), "config.input.b.data: unknown split 'no'"),
    (
      _data(pp=RANDOM_PP, cache_final=True),
      'config.input.cache_final: the pp has random ops',
    ),
    (
      _data(pre_filter_fn=lambda f: f['label']),
      'config.input.pre_filter_fn: gives TensorSpec',
    ),
    (_data(skip_errors=1), 'config.input.skip_errors is 1, of type int'),
  ],
)  # fmt: skip
def test_mistakes(options, message):
  plan = _check(input=options)
  assert any(message in m for m in plan.mistakes.messages)


def test_more_than_the_memory_is_found_before(tmp_path, monkeypatch):
  plan = _check(input=_data(cache_final=True))
  assert not plan.mistakes.messages
  memory = 100 * (8 * 8 * 3 + 10 * 4) - 1  # A byte less than 100 examples.
  monkeypatch.setattr(preflight, 'physical_memory', lambda: memory)
  (message,) = _check(input=_data(cache_final=True)).mistakes.messages
  assert 'would take 23.2 kB of this machine' in message


def test_memory_of_the_windows(sharded_source, tiny_cifar10):
  """Twice the buffer, in proportion to the bytes of the split."""
  data = dict(name='cifar10', split='train', data_dir=tiny_cifar10)
  options = _data(data=data, max_in_memory_gb=0, shuffle_buffer_size=10)
  plan = _check(input=options)
  (path,) = (s.path for s in plan.parts[0].source.shards)
  size = tf.io.gfile.stat(path).length
  assert preflight.host_bytes(plan) == pytest.approx(20 / 50 * size, rel=0.05)
