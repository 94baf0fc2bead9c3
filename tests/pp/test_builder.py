"""Parsing of pp strings, the table of ops, and every mistake's message."""

import importlib
import sys

import jax
import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp import ops_general, registry
from big_vision_dpn.pp.builder import get_preprocess_fn, import_ops
from big_vision_dpn.pp.registry import register

SEED = (1, 2)


@pytest.fixture(autouse=True)
def ops(monkeypatch):
  """The ops of the package, and a few that show what they were given."""
  monkeypatch.setattr(registry, 'OPS', dict(registry.OPS))

  @register('add', key='image')
  def add(n, scale=1):
    return lambda x: x + n * scale

  @register('note')
  def note(*args, **kwargs):
    def fn(features):
      features['note'] = (args, kwargs)
      return features

    return fn

  @register('draw', random=True)
  def draw(name):
    return lambda features, rng: {**features, name: rng.uniform()}

  @register('noise', random=True, key='image')
  def noise():
    return lambda x, rng: x + rng.uniform()


def _run(pp, **features):
  return get_preprocess_fn(pp)(features, SEED)


def _mistake(pp):
  with pytest.raises(ConfigError) as e:
    get_preprocess_fn(pp)
  return str(e.value)


@pytest.mark.parametrize('pp', ['', '  ', '\n'])
def test_empty_is_the_identity(pp):
  assert _run(pp, image=1, label=2) == {'image': 1, 'label': 2}


def test_an_escaped_quote_ends_no_string():
  pp = r"""note('it\'s #1||', "a\\")|add(1)"""
  assert _run(pp, image=0)['note'][0] == ("it's #1||", 'a\\')


def test_ops_apply_from_left_to_right():
  assert _run('add(1)|add(10, scale=2)|copy("image", "b")', image=0) == {
    'image': 21,
    'b': 21,
  }


def test_lines_and_blanks_do_not_matter():
  pp = '\n  add(1)\n  | add(\n    2) |add(3)\n'
  assert _run(pp, image=0)['image'] == 6


def test_arguments_are_python_literals():
  pp = (
    'note(-1, 2.5, 1e-3, (1, -2), [3, (4,)], True, None, "a|b", \'c"|(\', '
    'x={"k": 1}, y="#")'
  )
  args, kwargs = _run(pp)['note']
  assert args == (
    *(-1, 2.5, 1e-3, (1, -2), [3, (4,)], True, None),
    *('a|b', 'c"|('),
  )
  assert kwargs == {'x': {'k': 1}, 'y': '#'}


@pytest.mark.parametrize(
  'arguments, read, written',
  [
    ('', 'image', 'image'),
    ('key="a"', 'a', 'a'),
    ('inkey="a"', 'a', 'image'),
    ('outkey="a"', 'image', 'a'),
    ('inkey="a", outkey="b"', 'a', 'b'),
    ('key="a", outkey="b"', 'a', 'b'),
    ('key="a", inkey="b"', 'b', 'a'),
  ],
)
def test_keys(arguments, read, written):
  features = {'image': 0, 'a': 100, 'b': 200}
  got = _run(f'add(1, {arguments})', **features)
  assert got == {**features, written: features[read] + 1}


def test_the_given_dict_stays():
  features = {'image': 1, 'label': 2}
  get_preprocess_fn('note(1)|add(1)|drop("label")')(features, SEED)
  assert features == {'image': 1, 'label': 2}


def test_every_op_draws_for_itself():
  a = _run('draw("a")|draw("b")|noise|draw("c")', image=0.0)
  assert len({float(v) for v in a.values()}) == 4
  assert a == _run('draw("a")|draw("b")|noise|draw("c")', image=0.0)
  other = get_preprocess_fn('draw("a")')({}, (1, 3))
  assert float(other['a']) != float(a['a'])


def test_without_random_ops_the_seed_is_not_read():
  assert get_preprocess_fn('add(1)')({'image': 0}, None) == {'image': 1}


def test_in_a_dataset_as_in_eager_mode():
  fn = get_preprocess_fn('draw("a")|noise|draw("b")')
  data = tf.data.Dataset.range(20).map(
    lambda i: fn({'image': tf.cast(i, tf.float32)}, tf.stack([i, 5])),
    num_parallel_calls=4,
  )
  for i, got in enumerate(data.as_numpy_iterator()):
    want = fn({'image': tf.constant(i, tf.float32)}, tf.constant([i, 5]))
    assert got.keys() == want.keys()
    for key in got:
      np.testing.assert_array_equal(got[key], want[key])


UINT8 = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
FLOAT = UINT8 / 127.5 - 1


def _both(pp, **features):
  """The features after the host's part, and after the device's."""
  fn = get_preprocess_fn(pp)
  data = tf.data.Dataset.from_tensors(features)
  data = data.map(lambda x: fn(x, tf.constant(SEED))).batch(1)
  host = next(data.as_numpy_iterator())
  return host, jax.jit(fn.on_device)(host)


def test_value_range_as_the_last_op_is_left_to_the_device():
  host, device = _both('flip_lr|flip_lr|value_range(-1, 1)', image=UINT8[:, :1])
  assert host['image'].dtype == np.uint8
  np.testing.assert_array_equal(host['image'][0], UINT8[:, :1])
  assert device['image'].dtype == np.float32
  np.testing.assert_allclose(device['image'][0], FLOAT[:, :1], atol=1e-6)


@pytest.mark.parametrize(
  'pp, deferred, read',
  [
    ('value_range|keep("image")', {'image'}, {}),
    ('value_range|copy("image", "b")', {'image', 'b'}, {}),
    ('value_range(outkey="b")', {'b'}, {}),
    ('value_range(outkey="b")|drop("image")', {'b'}, {}),
    ('copy("image", "b")|value_range|value_range(key="b")', {'image', 'b'}, {}),
    ('value_range|add(0)', set(), {'image'}),
    ('value_range|add(0, outkey="b")', {'image'}, {'b'}),
    ('value_range|copy("image", "b")|add(0)', {'b'}, {'image'}),
    ('value_range|value_range(-1, 1, -1, 1)', set(), {'image'}),
  ],
)
def test_who_reads_the_result_gets_it(pp, deferred, read):
  host, device = _both(pp, image=UINT8, label=np.int64(3))
  assert {k for k, v in host.items() if v.dtype == np.uint8} - {
    'image'
  } == deferred - {'image'}
  for name in deferred:
    assert host[name].dtype == np.uint8
  for name in read:
    np.testing.assert_allclose(host[name][0], FLOAT, atol=1e-6)
  assert host.keys() == device.keys()
  for name in {*deferred, *read}:
    np.testing.assert_allclose(device[name][0], FLOAT, atol=1e-6)
  if 'label' in host:
    assert device['label'] == 3


def test_value_range_of_other_images_is_the_hosts():
  host, _ = _both('value_range', image=UINT8.astype(np.float32))
  assert host['image'].dtype == np.float32
  np.testing.assert_allclose(host['image'][0], FLOAT, atol=1e-6)
  host, _ = _both('value_range(0, 1, [0, 0, 0])', image=np.uint8(255))
  np.testing.assert_array_equal(host['image'], [[1, 1, 1]])


@pytest.mark.parametrize(
  'arguments',
  [
    '',
    '0, 1',
    '-2, 2, 10, 20, True',
    'vmin=1, vmax=0',
    '0, 1, [123.675, 116.28, 103.53], [182.07, 173.4, 160.905]',
  ],
)
def test_on_the_device_as_on_the_host(arguments):
  image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
  _, device = _both(f'value_range({arguments})', image=image)
  # The result of another op stays on the host.
  host, _ = _both(f'value_range({arguments})|add(0.0)', image=image)
  assert host['image'].dtype == device['image'].dtype == np.float32
  np.testing.assert_allclose(
    device['image'], host['image'], rtol=1e-6, atol=1e-6
  )
  if '[' not in arguments:  # Then 0 or 255 need not be an end.
    for end in (0, -1):
      np.testing.assert_array_equal(
        device['image'][0, end, end], host['image'][0, end, end]
      )


def test_without_anything_left_the_batch_stays():
  host, _ = _both('flip_lr', image=UINT8)
  fn = get_preprocess_fn('flip_lr')
  fn({'image': UINT8}, SEED)
  assert fn.on_device(host) == host


def test_on_device_needs_a_trace():
  with pytest.raises(AssertionError, match='before the host part was traced'):
    get_preprocess_fn('value_range').on_device({'image': UINT8})


def test_features_that_are_not_of_the_host():
  fn = get_preprocess_fn('value_range|copy("image", "b")')
  fn({'image': tf.constant(UINT8)}, SEED)
  got = fn.on_device({'image': UINT8[None], '_mask': np.ones(1)})
  np.testing.assert_allclose(got['image'][0], FLOAT, atol=1e-6)
  assert got.keys() == {'image', '_mask'} and got['_mask'] == 1


# The string, the number of the op, its column from 1, what the message says.
MISTAKES = [
  ('resiz(224)', 1, 1, "unknown pp op 'resiz'. Did you mean 'resize'?"),
  ('flip_lr|\n resiz(4)', 2, 11, "Did you mean 'resize'"),
  ('note("é|")|nope', 2, 12, "unknown pp op 'nope'"),
  ('flip_lr|resize(sise=2)', 2, 9, "'sise'. Did you mean 'size'?"),
  ('resize(1, "area", True, 4)', 1, 1, 'too many positional arguments'),
  ('flip_lr | resize', 2, 11, "missing a required argument: 'size'"),
  ('resize()', 1, 1, "resize(size, method='bilinear', antialias=False"),
  ('resize(1, size=2)', 1, 1, "multiple values for argument 'size'"),
  ('resize(size=1, size=2)', 1, 1, "'size' is given twice"),
  ('flip_lr|resize(big)', 2, 16, 'expected a literal'),
  ('resize(2*3)', 1, 8, 'got 2 * 3'),
  ('resize(size=big)', 1, 13, 'got big'),
  ('resize(*[1])', 1, 8, 'got *[1]'),
  ('resize(**{})', 1, 1, 'expected name=value'),
  ('resize("big")', 1, 1, '(height, width), such as 224 or (224, 320)'),
  ('value_range("x")', 1, 1, 'could not convert string to float'),
  ('flip_lr||resize(4)', 2, 9, 'an op is empty'),
  ('flip_lr| |resize(4)', 2, 9, 'an op is empty'),
  ('|flip_lr', 1, 1, 'an op is empty'),
  ('flip_lr|', 2, 9, 'an op is empty'),
  ('flip_lr|resize(4', 2, 15, 'never closed'),
  ('note("|")|resize(4))', 2, 20, 'unmatched'),
  ('flip_lr|resize 4', 2, 16, 'invalid syntax'),
  ('flip_lr|"resize', 2, 9, 'unterminated string'),
  ('flip_lr|3', 2, 9, 'expected an op such as flip_lr or resize(224), got 3'),
  ('flip_lr|image.resize(4)', 2, 9, 'got image.resize(4)'),
  ('flip_lr+resize(4)', 1, 1, 'got flip_lr + resize(4)'),
  ('flip_lr # |resize(4)', 1, 9, 'unexpected #'),
]


@pytest.mark.parametrize('pp, number, column, words', MISTAKES)
def test_a_mistake_is_named_with_its_place(pp, number, column, words):
  message = _mistake(pp)
  assert message.startswith(f'pp op {number}')
  assert f'column {column} of {pp!r}: ' in message
  assert words in message


def test_an_op_is_named_in_the_message():
  assert _mistake('flip_lr|resize(x)').startswith('pp op 2 (resize), column')


def test_not_a_string():
  assert _mistake(None) == 'expected a pp string, got None'


def test_a_missing_feature_is_named():
  fn = get_preprocess_fn('flip_lr|add(1, inkey="imagge")')
  with pytest.raises(ConfigError) as e:
    fn({'image': tf.zeros([2, 2, 3]), 'id': 1}, SEED)
  assert str(e.value) == (
    'pp op 2 (add), column 9 of \'flip_lr|add(1, inkey="imagge")\': unknown '
    "feature 'imagge'. Did you mean 'image'? Choices: id, image."
  )


@pytest.mark.parametrize(
  'op', ['onehot(3, key="x")', 'keep("x")', 'drop("x")', 'copy("x", "y")']
)
def test_a_missing_feature_is_named_by_ops_on_the_dict(op):
  with pytest.raises(ConfigError, match=r"feature 'x'.*Choices: image"):
    _run(f'add(1)|{op}', image=1)


def test_the_error_is_the_same_in_a_dataset():
  fn = get_preprocess_fn('central_crop(9)')
  data = tf.data.Dataset.from_tensors(tf.zeros([8, 8, 3]))

  # AutoGraph converts this caller, and would change the type of the error.
  def call(image):
    return fn({'image': image}, None)

  with pytest.raises(ConfigError, match=r'^pp op 1 \(central_crop\), column 1'):
    data.map(call)


def test_any_other_error_says_in_which_op():
  with pytest.raises(ConfigError) as e:
    _run('note(1)|add(1)', image=None)
  assert str(e.value).startswith('pp op 2 (add), column 9 of')
  assert 'TypeError' in str(e.value)


def test_import_of_own_modules(tmp_path, monkeypatch):
  (tmp_path / 'user_ops').mkdir()
  (tmp_path / 'user_ops/mine.py').write_text(
    'from big_vision_dpn.pp.registry import register\n'
    "@register('twice', key='image')\n"
    'def twice():\n'
    '  return lambda x: 2 * x\n'
  )
  (tmp_path / 'user_ops/broken.py').write_text('import nothing_such\n')
  monkeypatch.syspath_prepend(tmp_path)
  import_ops(['ops_general', 'user_ops.mine'])
  assert _run('twice', image=3) == {'image': 6}
  importlib.reload(sys.modules['user_ops.mine'])
  assert _run('twice', image=3) == {'image': 6}
  with pytest.raises(ConfigError, match=r'user_ops\.broken.*nothing_such'):
    import_ops(['user_ops.broken'])


def test_import_of_an_unknown_module():
  with pytest.raises(ConfigError, match=r"'ops_imag'\. Did you mean 'ops_im"):
    import_ops(['ops_imag'])
  with pytest.raises(ConfigError, match=r'no_such\.ops does not import'):
    import_ops(['no_such.ops'])


def test_big_visions_name_for_randaug():
  import_ops(['ops_general', 'ops_image', 'archive.randaug'])
  get_preprocess_fn('randaug(2,10)')


def test_a_name_is_registered_once():
  def second():
    return lambda x: x

  with pytest.raises(ConfigError, match="'flip_lr' is registered twice") as e:
    register('flip_lr')(second)
  assert 'ops_image.py:' in str(e.value) and __file__ in str(e.value)
  importlib.reload(ops_general)


def test_a_registered_factory_stays_as_it_was():
  assert ops_general.value_range(0, 1)(255).numpy() == 1


def test_default_modules_hold_the_ops_of_the_recipe():
  assert {
    *('decode_jpeg_and_inception_crop', 'flip_lr', 'randaug', 'value_range'),
    *('onehot', 'keep', 'decode', 'resize', 'resize_small', 'central_crop'),
  } <= registry.OPS.keys()
