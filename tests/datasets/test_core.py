"""Split expressions against Python's slices."""

import pytest
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core

SIZES = {'train': 1000, 'test': 101}


@pytest.mark.parametrize(
  ('split', 'expected'),
  [
    ('train', [('train', range(1000))]),
    ('train[:99%]', [('train', range(990))]),
    ('train[99%:]', [('train', range(990, 1000))]),
    ('test[50%:]', [('test', range(50, 101))]),
    ('train[-3:]', [('train', range(997, 1000))]),
    ('train[10:20]+test', [('train', range(10, 20)), ('test', range(101))]),
  ],
)
def test_slice_split(split, expected):
  assert core.slice_split(split, SIZES) == expected


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    ('trian', "unknown split 'trian'. Did you mean 'train'"),
    ('train[:', 'expected e.g. "train"'),
    ('train[:2000]', "split 'train"),
  ],
)
def test_slice_split_mistakes(split, message):
  with pytest.raises(ConfigError) as e:
    core.slice_split(split, SIZES)
  assert message in str(e.value)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({}, 'data needs a name'),
    ({'name': 'bv:mnist5k'}, "needs 'split'"),
    ({'name': 'bv:mnits5k', 'split': 'test'}, "Did you mean 'bv:mnist5k'"),
    ({'name': 'bv:no.such'}, 'module no.such does not import'),
    ({'name': 'bv:os.path'}, 'no function get'),
    ({'name': 'bv:mnist5k', 'split': 'test', 'dir': 1}, "'dir'"),
  ],
)
def test_get_mistakes(data, message):
  with pytest.raises(ConfigError) as e:
    core.get(**data)
  assert message in str(e.value)


def test_in_memory_holds_the_same_records(sharded_source):
  held = sharded_source.in_memory()
  assert [int(held.lookup(i)) for i in range(50)] == list(range(50))
  assert held.shards == ()
  assert held.in_memory() is held


def test_spec_of_reads_nothing():
  spec = core.spec_of(
    lambda path: {'x': tf.io.read_file(path)}, tf.TensorSpec([], tf.string)
  )
  assert spec == {'x': tf.TensorSpec([], tf.string)}
