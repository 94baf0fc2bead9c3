"""Eight CPU devices, so that sharding is tested, and small data sets."""

import os

# Before jax starts. A subprocess of a test has one device unless it asks.
# Optimised code is the same, and its compilation half of the suite's time.
_FLAGS = '--xla_backend_optimization_level=0 ' + os.environ.get('XLA_FLAGS', '')
os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_force_host_platform_device_count=8'

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from big_vision_dpn import config  # noqa: E402
from big_vision_dpn.pp import builder  # noqa: E402

jax.devices()
os.environ['XLA_FLAGS'] = _FLAGS
builder.import_ops(config.FIELDS['pp_modules'].default)


@pytest.fixture(scope='session')
def tiny_cifar10(tmp_path_factory) -> str:
  """A TFDS folder with a cifar10 of 50 train and 21 test images.

  Written by TFDS itself with the features and the version of the official
  class, which then reads it.
  """
  import tensorflow_datasets as tfds

  folder = str(tmp_path_factory.mktemp('tfds'))
  reference = tfds.builder('cifar10', data_dir=folder)
  rng = np.random.default_rng(0)

  def examples(split, n):
    for i in range(n):
      yield (
        f'{split}_{i}',
        {
          'id': f'{split}_{i}',
          'image': rng.integers(0, 256, (32, 32, 3), np.uint8),
          'label': i % 10,
        },
      )

  tfds.dataset_builders.store_as_tfds_dataset(
    name='cifar10',
    version=str(reference.version),
    features=reference.info.features,
    split_datasets={
      'train': examples('train', 50),
      'test': examples('test', 21),
    },
    data_dir=folder,
  )
  return folder


@pytest.fixture(scope='session')
def sharded_source(tmp_path_factory):
  """50 records in six TFRecord files of different lengths; record i is "i"."""
  import tensorflow as tf

  from big_vision_dpn.datasets import core, tfrecord

  folder = tmp_path_factory.mktemp('shards')
  shards, number = [], 0
  for i, length in enumerate([7, 12, 9, 11, 3, 8]):
    path = str(folder / f'{i}.tfrecord')
    with tf.io.TFRecordWriter(path) as writer:
      for _ in range(length):
        writer.write(str(number).encode())
        number += 1
    shards.append(tfrecord.Shard(path, 0, length))
  return core.Source(
    name='numbers',
    parse=lambda r: {'id': tf.strings.to_number(r, tf.int64)},
    record_spec=tf.TensorSpec([], tf.string),
    num_examples=number,
    num_bytes=number * 100,
    shards=tuple(shards),
  )
