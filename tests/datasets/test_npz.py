"""Arrays of .npz files against the arrays they were written from."""

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core


def _get(fname, **arguments):
  return core.get(name='bv:npz', fname=str(fname), **arguments)


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_examples_are_the_rows(tmp_path, request, way, save):
  arrays = {
    'image': np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8),
    'label': np.arange(9, dtype=np.int32),
    'text': np.array(['', 'Zürich'] + ['x'] * 7),
    'raw': np.array([b'', b'\xff\xfe'] + [b'x'] * 7),
  }
  save(tmp_path / 'a.npz', **arrays)
  source = _get(tmp_path / 'a.npz')
  assert source.record_spec == {
    'image': tf.TensorSpec([4, 4, 3], tf.uint8),
    'label': tf.TensorSpec([], tf.int32),
    'text': tf.TensorSpec([], tf.string),
    'raw': tf.TensorSpec([], tf.string),
    'id': tf.TensorSpec([], tf.int64),
  }
  examples = request.getfixturevalue(way)(source)
  assert sorted(e['id'] for e in examples) == list(range(9))
  for example in examples:
    i = example['id']
    np.testing.assert_array_equal(example['image'], arrays['image'][i])
    assert example['label'] == i
    assert example['text'].decode() == arrays['text'][i]
    assert example['raw'] == arrays['raw'][i]


def test_splits_are_the_first_part_of_names(tmp_path, infer):
  np.savez(
    tmp_path / 'a.npz',
    **{
      'train/x': np.arange(10),
      'test/x': -np.arange(5),
      'test/id': np.arange(100, 105),
      'train/id': np.arange(10),
      'extra/y': np.zeros(3),
    },
  )
  fname = tmp_path / 'a.npz'
  examples = infer(_get(fname, split='train[8:]+test[:40%]'))
  assert [(e['x'], e['id']) for e in examples] == [
    (8, 8),
    (9, 9),
    (0, 100),
    (-1, 101),
  ]
  assert infer(_get(fname, split='extra[1:]'))[0]['id'] == 1
  with pytest.raises(ConfigError, match=r'extra has the features id, y; expec'):
    _get(fname, split='train+extra')


@pytest.mark.parametrize(
  ('arrays', 'split', 'message'),
  [
    ({'a': np.zeros(3), 'b': np.zeros(4)}, 'all', 'a 3, b 4'),
    ({'a': np.float32(3)}, 'all', "'a' is a scalar"),
    ({'a': np.array([{}])}, 'all', "'a' cannot be read"),
    ({'a': np.zeros(2, 'M8[s]')}, 'all', 'is of dtype datetime64[s]'),
    ({'a/x': np.zeros(2), 'b': np.zeros(2)}, 'a', 'or none of them'),
    ({'a/x': np.zeros(2), 'b/x': np.zeros(2, int)}, 'a+b', 'same dtype'),
    ({'train/x': np.zeros(2)}, 'trian', "Did you mean 'train'"),
    ({'x': np.zeros(2)}, 'train', 'Choices: all'),
    ({'x': np.zeros(0)}, 'all', 'has no examples'),
    ({}, 'all', 'cannot be read as an .npz file'),
  ],
)
def test_mistakes(tmp_path, arrays, split, message):
  np.savez(tmp_path / 'a.npz', **arrays)
  with pytest.raises(ConfigError) as e:
    _get(tmp_path / 'a.npz', split=split)
  assert message in str(e.value)


def test_files_that_are_no_npz(tmp_path):
  with pytest.raises(ConfigError, match=r'no\.npz does not exist'):
    _get(tmp_path / 'no.npz')
  (tmp_path / 'a.npz').write_bytes(b'PK\x03\x04 and no more')
  with pytest.raises(ConfigError, match='cannot be read as'):
    _get(tmp_path / 'a.npz')
  np.save(tmp_path / 'a.npy', np.zeros(3))
  with pytest.raises(ConfigError, match='cannot be read as'):
    _get(tmp_path / 'a.npy')
  (tmp_path / 'empty.npz').touch()
  with pytest.raises(ConfigError, match='cannot be read as'):
    _get(tmp_path / 'empty.npz')
