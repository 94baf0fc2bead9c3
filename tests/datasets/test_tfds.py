"""TFDS data, read by the official classes from small folders."""

import collections
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core


def _read(source):
  source = source.in_memory()
  records = [source.lookup(i) for i in range(source.num_examples)]
  return [{k: v.numpy() for k, v in source.parse(r).items()} for r in records]


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


def test_real_cifar10_where_tfds_has_it(infer):
  source = core.get(name='cifar10', split='test')
  if source.missing:
    pytest.skip(source.missing)
  examples = infer(source, lambda features, key: {'label': features['label']})
  labels = [e['label'] for e in examples]
  assert np.bincount(labels).tolist() == [1000] * 10


def _store(folder, file_format, name='cifar10', examples=None, features=None):
  """Stores tiny data; by default 60 images in three shards, as cifar10."""
  if features is None:
    features = tfds.builder(name, data_dir=str(folder)).info.features
  if examples is None:
    rng = np.random.default_rng(1)
    examples = [
      {
        'id': str(i),
        'image': rng.integers(0, 256, (32, 32, 3), np.uint8),
        'label': i % 10,
      }
      for i in range(60)
    ]
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version='3.0.2',
    features=features,
    split_datasets={'train': enumerate(examples)},
    data_dir=str(folder),
    file_format=file_format,
    download_config=tfds.download.DownloadConfig(num_shards=3),
  )
  return str(folder)


@pytest.fixture(scope='module')
def both_formats(tmp_path_factory):
  """The same data as tfrecord and as array_record: two folders."""
  make = tmp_path_factory.mktemp
  return [_store(make(f), f) for f in ('tfrecord', 'array_record')]


@pytest.mark.parametrize(
  'split', ['train', 'train[:10%]', 'train[15:47]', 'train[50:]+train[3:5]']
)
def test_array_record_gives_the_examples_of_tfrecord(both_formats, split):
  tfrecord, array_record = (
    core.get(name='cifar10', split=split, data_dir=d) for d in both_formats
  )
  assert tfrecord.lookup is None
  assert array_record.lookup is not None
  assert tfrecord.num_examples == array_record.num_examples
  assert tfrecord.record_spec == array_record.record_spec
  assert _read(tfrecord) == _read(array_record)


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_array_record_in_batches(both_formats, request, way):
  source = core.get(name='cifar10', split='train[5:]', data_dir=both_formats[1])
  examples = request.getfixturevalue(way)(source)
  expected = _read(source)
  ids = [e['id'] for e in expected]
  assert len(set(ids)) == 55
  assert {e['id']: e['image'] for e in examples} == {
    e['id']: e['image'] for e in expected
  }
  assert ([e['id'] for e in examples] == ids) == (way == 'infer')


def test_array_record_is_read_by_many_threads_at_once(both_formats):
  source = core.get(name='cifar10', split='train', data_dir=both_formats[1])
  records = [source.lookup(i).numpy() for i in range(60)]
  indices = np.random.default_rng(0).integers(0, 60, 4000)
  fresh = core.get(name='cifar10', split='train', data_dir=both_formats[1])
  parallel = tf.data.Dataset.from_tensor_slices(indices).map(
    fresh.lookup, num_parallel_calls=16
  )
  assert list(parallel.as_numpy_iterator()) == [records[i] for i in indices]


def test_array_record_names_the_file_of_an_example(both_formats):
  source = core.get(
    name='cifar10', split='train[15:]', data_dir=both_formats[1]
  )
  lengths = tfds.builder('cifar10', data_dir=both_formats[1]).info.splits[
    'train'
  ]
  assert lengths.shard_lengths == [20, 20, 20]
  assert 'example 7: record 2 of' in source.where(7)
  assert source.where(7).endswith('array_record-00001-of-00003')


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_an_array_record_file_that_is_gone_is_named(tmp_path, request, way):
  folder = _store(tmp_path, 'array_record')
  (path,) = tmp_path.glob('cifar10/*/*.array_record-00001-of-00003')
  path.unlink()
  source = core.get(name='cifar10', split='train', data_dir=folder)
  with pytest.raises(core.DataError, match=str(path)):
    request.getfixturevalue(way)(source)


def test_array_record_without_its_package(both_formats, monkeypatch):
  monkeypatch.setitem(sys.modules, 'array_record.python', None)
  with pytest.raises(ConfigError, match='pip install array_record'):
    core.get(name='cifar10', split='train', data_dir=both_formats[1])


@pytest.fixture(scope='module')
def prepared_without_code(tmp_path_factory):
  """A prepared data set "texts", of which TFDS has no class."""
  features = tfds.features.FeaturesDict(
    {
      'text': tfds.features.Text(),
      'label': tfds.features.ClassLabel(num_classes=2),
    }
  )
  texts = [b'', b'\xff\xfe', 'Zürich'.encode(), b'a', b'b']
  examples = [{'text': t, 'label': i % 2} for i, t in enumerate(texts)]
  folder = tmp_path_factory.mktemp('no_code')
  return _store(folder, 'tfrecord', 'texts', examples, features)


@pytest.mark.parametrize(
  ('name', 'data_dir'),
  [
    ('texts', '{folder}'),
    ('texts:3.0.2', '{folder}'),
    ('{folder}/texts/3.0.2', None),
  ],
)
def test_prepared_data_without_its_code(
  prepared_without_code, name, data_dir, infer
):
  folder = prepared_without_code
  data_dir = data_dir and data_dir.format(folder=folder)
  source = core.get(
    name=name.format(folder=folder), split='train', data_dir=data_dir
  )
  counts = collections.Counter(e['text'] for e in infer(source))
  texts = [b'', b'\xff\xfe', 'Zürich'.encode(), b'a', b'b']
  assert counts == dict.fromkeys(texts, 1)


def test_a_folder_in_the_home_directory(prepared_without_code, monkeypatch):
  monkeypatch.setenv('HOME', prepared_without_code)
  source = core.get(name='~/texts/3.0.2', split='train[:2]')
  assert len(_read(source)) == 2


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'name': '{folder}/texts'}, 'Expected {folder}/texts/3.0.2'),
    ({'name': '{folder}'}, 'Expected {folder}/texts/3.0.2'),
    ({'name': '{folder}/x'}, 'Expected a folder like ~/tensorflow_datasets/'),
    ({'name': '{folder}/texts/3.0.2', 'data_dir': '/x'}, 'means nothing'),
    ({'name': '{folder}/texts/3.0.2', 'split': 'tain'}, "mean 'train'"),
    ({'name': 'texts', 'data_dir': '{folder}', 'split': 'all[:1]'}, 'expected'),
    ({'name': 'texts'}, "no data set 'texts' in TFDS or prepared in"),
  ],
)
def test_mistakes_in_folders(prepared_without_code, data, message):
  folder = prepared_without_code
  data = {'split': 'train'} | {
    k: v.format(folder=folder) for k, v in data.items()
  }
  with pytest.raises(ConfigError) as e:
    core.get(**data)
  assert message.format(folder=folder) in str(e.value)


def test_a_format_that_is_not_read(tmp_path, both_formats):
  shutil.copytree(both_formats[0], tmp_path, dirs_exist_ok=True)
  (info,) = tmp_path.glob('cifar10/*/dataset_info.json')
  info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
  with pytest.raises(ConfigError, match='is stored as riegeli; expected tfrec'):
    core.get(name='cifar10', split='train', data_dir=str(tmp_path))
