"""Ops of ops_general, and the one of ops_lookup."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.pp.builder import get_preprocess_fn


def _run(pp, **features):
  return get_preprocess_fn(pp)(features, None)


IMAGE = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)


def _run_all(pp, **features):
  """Both parts, the device's on a batch of one."""
  preprocess = get_preprocess_fn(pp)
  features = preprocess(features, None)
  batch = {k: jnp.asarray(v)[None] for k, v in features.items()}
  batch = jax.jit(preprocess.on_device)(batch)
  return {k: v[0] for k, v in batch.items()}


def test_value_range_default():
  got = _run_all('value_range', image=tf.constant(IMAGE))['image']
  assert got.dtype == np.float32
  # The two ends exactly, the rest to a float32's last bit.
  assert got[0, 0, 0] == -1 and got[-1, -1, 0] == 1
  np.testing.assert_allclose(got, IMAGE / 127.5 - 1, atol=1.2e-7)


@pytest.mark.parametrize(
  'arguments, want',
  [
    ('-1, 1', lambda x: x / 127.5 - 1),
    ('0, 1', lambda x: x / 255),
    ('0, 1, 0, 1', lambda x: x),
    ('-2, 2, 10, 20', lambda x: (x - 10) / 10 * 4 - 2),
    ('-2, 2, 10, 20, True', lambda x: np.clip((x - 10) / 10 * 4 - 2, -2, 2)),
    (
      '0, 1, [0, 50, 100], (255, 60, 200)',
      lambda x: (x - [0, 50, 100]) / np.subtract([255, 60, 200], [0, 50, 100]),
    ),
    ('vmin=1, vmax=0', lambda x: 1 - x / 255),
  ],
)
@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.float32])
def test_value_range(arguments, want, dtype):
  got = _run_all(
    f'value_range({arguments})', image=tf.constant(IMAGE.astype(dtype))
  )
  np.testing.assert_allclose(
    got['image'], want(IMAGE.astype(float)), rtol=1e-5, atol=1e-7
  )


def test_value_range_of_nothing():
  with pytest.raises(ConfigError, match='in_min and in_max are equal'):
    get_preprocess_fn('value_range(0, 1, 3, 3)')


@pytest.mark.parametrize(
  'labels, arguments, want',
  [
    (2, '', [0, 0, 1, 0]),
    (-1, '', [0, 0, 0, 0]),
    (2, ', on=0.9, off=0.1', [0.1, 0.1, 0.9, 0.1]),
    ([2], '', [0, 0, 1, 0]),
    ([0, 2, 2], '', [1, 0, 1, 0]),
    ([0, -1, 3], '', [1, 0, 0, 1]),
    ([0, 2], ', on=5, off=-1', [5, -1, 5, -1]),
    (np.zeros([0], np.int64), '', [0, 0, 0, 0]),
    ([0, 2], ', multi=False', [[1, 0, 0, 0], [0, 0, 1, 0]]),
    ([[0], [2]], '', [1, 0, 1, 0]),
  ],
)
@pytest.mark.parametrize('dtype', [tf.int32, tf.int64])
def test_onehot(labels, arguments, want, dtype):
  got = _run(f'onehot(4{arguments})', labels=tf.constant(labels, dtype))
  assert got['labels'].dtype == tf.float32
  np.testing.assert_array_equal(got['labels'], np.float32(want))


def test_onehot_keys():
  got = _run('onehot(3, key="label", key_result="labels")', label=1)
  assert got['label'] == 1
  np.testing.assert_array_equal(got['labels'], [0, 1, 0])
  got = _run('onehot(3, "label")', label=1)
  np.testing.assert_array_equal(got['label'], [0, 1, 0])


def test_onehot_shape_is_static():
  fn = get_preprocess_fn('onehot(5)')
  for shape, want in (([], [5]), ([None], [5]), ([7], [5])):
    traced = tf.function(
      lambda x: fn({'labels': x}, None)
    ).get_concrete_function(tf.TensorSpec(shape, tf.int64))
    assert traced.structured_outputs['labels'].shape == want


@pytest.mark.parametrize('labels', [4, [1, 4]])
def test_onehot_of_a_label_outside_of_the_classes(labels):
  data = tf.data.Dataset.from_tensors({'labels': labels})
  data = data.map(lambda x: get_preprocess_fn('onehot(4)')(x, None))
  with pytest.raises(tf.errors.InvalidArgumentError, match='the 4 classes'):
    list(data)


@pytest.mark.parametrize('depth', ['0', '-3', '"a"', '2.5'])
def test_onehot_depth(depth):
  with pytest.raises(ConfigError, match='depth is the number of classes'):
    get_preprocess_fn(f'onehot({depth})')


def test_keep_drop_copy():
  features = {'a': 1, 'b': 2, 'c': 3}
  assert _run('keep("c", "a")', **features) == {'a': 1, 'c': 3}
  assert _run('drop("c", "a")', **features) == {'b': 2}
  assert _run('keep()', **features) == {}
  assert _run('copy("a", "d")', **features) == {**features, 'd': 1}
  assert _run('copy("a", outkey="b")', **features) == {**features, 'b': 1}


def _map(pp, features, specs=None):
  """What a pp string gives in tf.data, the features of one example."""
  data = tf.data.Dataset.from_tensors(features)
  if specs:
    data = tf.data.Dataset.from_generator(
      lambda: iter([features]), output_signature=specs
    )
  fn = get_preprocess_fn(pp)
  data = data.map(lambda x: fn(x, tf.constant([0, 0], tf.int64)))
  return data.element_spec, next(iter(data))


def _fails(pp, match, **features):
  with pytest.raises(ConfigError, match=match):
    _run(pp, **features)


STRINGS = np.array([['cat', 'dög'], ['', 'bird']], object)


@pytest.mark.parametrize(
  'content, arguments, want',
  [
    ('dog\ncat\ndög\n', '', [[1, 2], [-1, -1]]),
    ('dog\r\ncat\r\n\r\n', '', [[1, -1], [2, -1]]),
    ('dög\x0b\ncat', '', [[1, -1], [-1, -1]]),
    ('cat:7\ndög:-3\nbird:7', ', sep=":"', [[7, -3], [-1, 7]]),
    ('a cat 1\ncat 12345678901\n 5', ', sep=" "', [[12345678901, -1], [5, -1]]),
  ],
)
def test_lookup_in_text(tmp_path, content, arguments, want):
  path = tmp_path / 'names.txt'
  path.write_bytes(content.encode())
  spec, got = _map(f'lookup("{path}"{arguments}, key="x")', {'x': STRINGS})
  assert spec['x'].dtype == tf.int64 and spec['x'].shape == [2, 2]
  np.testing.assert_array_equal(got['x'], want)


@pytest.mark.parametrize('kind', ['U', 'S'])
def test_lookup_in_npz(tmp_path, kind):
  path = tmp_path / 'names.npz'
  words = np.array(['dög', 'cat'])
  words = words if kind == 'U' else np.char.encode(words, 'utf-8')
  np.savez(path, fnames=words, other=words[::-1])
  for arguments, want in (('', [1, 0]), (', "other"', [0, 1])):
    pp = f'lookup("{path}"{arguments}, inkey="x", outkey="y")'
    got = _run(pp, x=STRINGS[0])
    np.testing.assert_array_equal(got['y'], want)
    assert got['x'] is not got['y']


def test_lookup_outlives_what_made_it(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_text('a\nb\n')

  def iterator():
    fn = get_preprocess_fn(f'lookup("{path}", key="x")')
    data = tf.data.Dataset.from_tensor_slices({'x': ['a', 'b', 'c'] * 100})
    return iter(data.map(lambda x: fn(x, tf.constant([0, 0]))))

  got = iterator()
  gc.collect()
  assert [int(f['x']) for f in got] == [0, 1, -1] * 100


@pytest.mark.parametrize(
  'content, arguments, match',
  [
    ('a\nb\na\n', '', "maps b'a' to 0 and to 2; expected one number"),
    ('', '', 'is empty'),
    ('a:1\nb;2', ', sep=":"', "line 2 of .* is b'b;2'; expected a string, ':'"),
    ('a:1\nb:c', ', sep=":"', 'line 2 of .* whole number'),
    ('a:1', ', sep=""', 'sep is what divides'),
  ],
)
def test_lookup_in_a_bad_text(tmp_path, content, arguments, match):
  path = tmp_path / 'names.txt'
  path.write_text(content)
  _fails(f'lookup("{path}"{arguments})', match)


def test_lookup_in_a_bad_npz(tmp_path):
  path = tmp_path / 'names.npz'
  _fails(f'lookup("{path}")', f'cannot read .*{path}.* put the file there')
  _fails('lookup(3)', 'expected the path of a file, got 3')
  path.write_text('no archive')
  _fails(f'lookup("{path}")', f'{path}.* is no .npz file')
  np.savez(path, names=['a'], number=[1], objects=np.array(['a'], object))
  _fails(f'lookup("{path}")', "unknown array .*'fnames'. Did you mean 'names'")
  _fails(f'lookup("{path}", "number")', 'expected one row of strings')
  _fails(f'lookup("{path}", "objects")', 'not as dtype object')


def test_squeeze_last_dim():
  got = _run('squeeze_last_dim', image=IMAGE[..., :1])['image']
  np.testing.assert_array_equal(got, IMAGE[..., 0])
  _fails('squeeze_last_dim', 'squeeze_last_dim.*3', image=IMAGE)


def test_concat():
  a, b = np.arange(6).reshape(2, 3), np.arange(4).reshape(2, 2)
  got = _run('concat(["a", "b"], "c")', a=a, b=b)
  np.testing.assert_array_equal(got['c'], np.concatenate([a, b], -1))
  np.testing.assert_array_equal(got['a'], a)
  got = _run('concat(["b", "a", "b"])', a=a, b=b)
  np.testing.assert_array_equal(got['b'], np.concatenate([b, a, b], -1))
  got = _run('concat(("a", "a"), axis=0)', a=a)
  np.testing.assert_array_equal(got['a'], np.concatenate([a, a]))
  _fails('concat(["a", "b"], axis=0)', 'concat', a=a, b=b)
  _fails('concat(["a", "c"])', "unknown feature 'c'", a=a, b=b)
  _fails('concat([])', r'inkeys is \[\]; expected a feature')
  _fails('concat([1])', r'inkeys is \[1\]; expected a feature')


def test_rag_tensor_makes_batches_of_different_lengths():
  fn = get_preprocess_fn('rag_tensor(key="x")')
  data = tf.data.Dataset.range(4)
  data = data.map(lambda n: fn({'x': tf.range(n)}, None)).batch(4)
  got = next(iter(data))['x']
  assert got.to_list() == [[[]], [[0]], [[0, 1]], [[0, 1, 2]]]


@pytest.mark.parametrize(
  'shape, arguments, widths',
  [
    ((5, 4), '', ((0, 3), (0, 1))),
    ((5, 4), ', -1, "before"', ((3, 0), (1, 0))),
    ((5, 4), ', pad_value=7, where="both"', ((1, 2), (0, 1))),
    ((None, 4), ', where="both"', ((0, 0), (0, 1))),
    ((2, 3), '', ((0, 0), (0, 0))),
  ],
)
@pytest.mark.parametrize('known', [True, False])
def test_pad_to_shape(shape, arguments, widths, known):
  x = np.arange(6, dtype=np.int64).reshape(2, 3) + 10
  spec = {'x': tf.TensorSpec(x.shape if known else [None, None], tf.int64)}
  pp = f'pad_to_shape({shape}{arguments}, key="x")'
  spec, got = _map(pp, {'x': x}, spec)
  value = -1 if '-1' in arguments else 7 if '7' in arguments else 0
  want = np.pad(x, widths, constant_values=value)
  np.testing.assert_array_equal(got['x'], want)
  assert got['x'].dtype == tf.int64
  rows = 2 if known and shape[0] is None else shape[0]
  assert spec['x'].shape.as_list() == [rows, shape[1]]


def test_pad_to_shape_of_strings():
  got = _run('pad_to_shape([3], "", key="x")', x=tf.constant(['a', 'b']))
  np.testing.assert_array_equal(got['x'], [b'a', b'b', b''])


@pytest.mark.parametrize(
  'arguments, match',
  [
    ('8', 'shape is 8; expected sizes such as'),
    ('[-1, 2]', r'shape is \[-1, 2\]; expected sizes'),
    ('[2, True]', 'expected sizes'),
    ('(8, 8), where="around"', "unknown value of where 'around'.*before"),
    ('(8,)', r'shape \(2, 3\) cannot be padded to \(8,\)'),
    ('(8, 2)', r'shape \(2, 3\) cannot be padded to \(8, 2\)'),
    ('(8, 8), "a"', "pad_value is 'a'; expected .* dtype uint8 can have"),
    ('(8, 8), -1', 'pad_value is -1; expected .* dtype uint8 can have'),
    ('(8, 8), 256', 'pad_value is 256; expected'),
    ('(8, 8), 0.5', 'pad_value is 0.5; expected'),
  ],
)
def test_pad_to_shape_mistakes(arguments, match):
  _fails(f'pad_to_shape({arguments}, key="x")', match, x=np.ones((2, 3), 'u1'))


def test_pad_to_shape_of_a_larger_tensor():
  spec = {'x': tf.TensorSpec([None], tf.int64)}
  with pytest.raises(tf.errors.InvalidArgumentError, match='is larger than'):
    _map('pad_to_shape([3], key="x")', {'x': np.arange(4)}, spec)


def test_flatten():
  features = {'a': {'b': 1, 'c': {'d': 2, 'e': (3, {'f': 4})}}, 'g': 5, 'h': {}}
  _, got = _map('flatten', features)
  want = {'a/b': 1, 'a/c/d': 2, 'a/c/e/0': 3, 'a/c/e/1/f': 4, 'g': 5}
  assert {k: int(v) for k, v in got.items()} == want
  assert _run('flatten("g")', **features) == features
  got = _run('flatten(["a"])|keep("h", "a/b")', **features)
  assert got == {'h': {}, 'a/b': 1}
  _fails('flatten("b")', "unknown feature 'b'", a=1)
  _fails('flatten', "would be called 'a/b'", **{'a': {'b': 1}, 'a/b': 2})
  _fails('flatten(3)', 'keys is 3; expected a feature')


def test_reshape():
  got = _run('reshape((8, 32, -1))', image=IMAGE)['image']
  assert got.dtype == tf.uint8
  np.testing.assert_array_equal(got, IMAGE.reshape(8, 32, 3))
  assert _run('reshape([])', image=tf.ones([1]))['image'].shape == []
  _fails('reshape(768)', 'new_shape is 768; expected sizes')
  _fails('reshape((-1, -1))', 'expected -1 once at most')
  _fails('reshape((2, -2))', 'expected sizes')
  _fails('reshape((7, -1))', 'reshape', image=IMAGE)


@pytest.mark.parametrize(
  'x, shape, value, want',
  [
    ([3, 4], [None], 7, [3, 4]),
    ([3, 4], [2], 7, [3, 4]),
    ([], [None], 7, [7]),
    ([], [0], 7, [7]),
    ([], [None], [7, 8], [7, 8]),
    (np.zeros([0, 3]), [None, 3], 7, [[7, 7, 7]]),
    (np.zeros([0, 3]), [None, None], [1, 2], [[1, 2]]),
    (np.zeros([2, 0]), [2, None], 7, [[7], [7]]),
    (5, [], 7, 5),
  ],
)
def test_setdefault(x, shape, value, want):
  x = np.asarray(x, np.int64)
  spec = {'x': tf.TensorSpec(shape, tf.int64)}
  _, got = _map(f'setdefault("x", {value})', {'x': x}, spec)
  assert got['x'].dtype == tf.int64
  np.testing.assert_array_equal(got['x'], want)


def test_setdefault_of_strings_and_of_nothing():
  spec = {'x': tf.TensorSpec([None], tf.string)}
  _, got = _map('setdefault("x", "")', {'x': np.array([], object)}, spec)
  np.testing.assert_array_equal(got['x'], [b''])
  got = _run('setdefault("y", "none")', x=1)
  assert got['x'] == 1 and got['y'] == b'none'


@pytest.mark.parametrize(
  'value, match',
  [
    ('"a"', "value is 'a'; expected a value .* dtype int64"),
    ('0.5', 'value is 0.5; expected a value .* dtype int64'),
    ('[[1]]', "value is .*; expected one that fits 'x', of shape"),
  ],
)
def test_setdefault_that_does_not_fit(value, match):
  _fails(f'setdefault("x", {value})', match, x=np.zeros([0], np.int64))


@pytest.mark.parametrize(
  ('op', 'mean', 'std'),
  [
    ('vgg_value_range', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    (
      'clip_value_range',
      [122.7709, 116.7460, 104.0937],
      [68.5005, 66.6322, 70.3232],
    ),
    ('vgg_value_range(mean=(1, 2, 3), std=(4, 5, 6))', [1, 2, 3], [4, 5, 6]),
  ],
)
def test_value_ranges_of_other_models(op, mean, std):
  """As torchvision documents them for VGG, in units of 1/255, and CLIP."""
  want = (IMAGE - np.array(mean)) / std
  for got in (_run_all(op, image=IMAGE), _run(op, image=np.float32(IMAGE))):
    np.testing.assert_allclose(got['image'], want, rtol=1e-4, atol=1e-5)
  with pytest.raises(ConfigError, match='expected no 0'):
    get_preprocess_fn('vgg_value_range(std=(1, 0, 1))')
