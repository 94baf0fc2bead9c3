"""TFDS data, read by the official classes from small folders."""

import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core


def _read(source):
  source = source.in_memory()
  return [
    {k: v.numpy() for k, v in source.parse(r).items()} for r in source.records
  ]


@pytest.mark.parametrize(
  'split', ['train', 'test', 'train[:30%]', 'train[10:12]+train[45:]']
)
def test_same_examples_as_tfds(tiny_cifar10, split):
  source = core.get(name='cifar10', split=split, data_dir=tiny_cifar10)
  builder = tfds.builder('cifar10', data_dir=tiny_cifar10)
  config = tfds.ReadConfig(interleave_cycle_length=1)
  expected = list(
    tfds.as_numpy(builder.as_dataset(split=split, read_config=config))
  )
  actual = _read(source)
  assert source.num_examples == len(expected) == len(actual)
  for a, e in zip(actual, expected, strict=True):
    assert (a['id'], a['label']) == (e['id'], e['label'])
    image = tf.io.decode_image(a['image']).numpy()
    np.testing.assert_array_equal(image, e['image'])


def test_size_in_bytes_is_that_of_the_files(tiny_cifar10):
  whole = core.get(name='cifar10', split='train', data_dir=tiny_cifar10)
  half = core.get(name='cifar10', split='train[:50%]', data_dir=tiny_cifar10)
  on_disk = os.path.getsize(whole.shards[0].path)
  assert 0.9 * on_disk < whole.num_bytes <= on_disk
  assert half.num_bytes == whole.num_bytes // 2


def test_missing_data_says_how_to_prepare_it(tmp_path):
  source = core.get(name='cifar10', split='train', data_dir=str(tmp_path))
  assert f'{tmp_path}/cifar10' in source.missing
  assert f'tools.prepare_data cifar10 --data_dir={tmp_path}' in source.missing
  assert source.num_examples == 50_000
  features = core.spec_of(source.parse, source.record_spec)
  assert features['image'] == tf.TensorSpec([], tf.string)


def test_missing_imagenet_names_the_files_to_get(tmp_path):
  source = core.get(
    name='imagenet2012', split='train[:99%]', data_dir=str(tmp_path)
  )
  assert 'ILSVRC2012_img_train.tar' in source.missing
  assert f'{tmp_path}/downloads/manual' in source.missing
  assert source.num_examples == 1_268_355


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'name': 'cifr10', 'split': 'train'}, "Did you mean 'cifar10'"),
    ({'name': 'cifar10:1.2.3', 'split': 'train'}, '1.2.3'),
    ({'name': 'cifar10', 'split': 'val'}, 'Choices: test, train'),
  ],
)
def test_mistakes(tiny_cifar10, data, message):
  with pytest.raises(ConfigError) as e:
    core.get(data_dir=tiny_cifar10, **data)
  assert message in str(e.value)


def test_a_known_split_that_is_wrong_is_found_without_the_data(tmp_path):
  with pytest.raises(ConfigError, match="unknown split 'val'"):
    core.get(name='cifar10', split='val', data_dir=str(tmp_path))


def test_real_cifar10_where_tfds_has_it():
  source = core.get(name='cifar10', split='test')
  if source.missing:
    pytest.skip(source.missing)
  labels = [e['label'] for e in _read(source)]
  assert np.bincount(labels).tolist() == [1000] * 10
