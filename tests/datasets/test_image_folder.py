"""Folders of images that PIL writes, found by other means and compared."""

import collections
import io
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core
from big_vision_dpn.pp import builder


def _write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.full((6, 8, 3), value, np.uint8)
  formats = {'.jpg': 'JPEG', '.jpeg': 'JPEG'}
  suffix = path.suffix.lower()
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, formats.get(suffix, suffix[1:].upper()))
  path.write_bytes(content.getvalue())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """train: 10 cats, 12 dogs, one deep below; val: 3 owls; and other files."""
  root = tmp_path_factory.mktemp('pets')
  for i in range(10):
    _write(root / f'train/cat/{i}.jpg', 10 * i)
  for i, suffix in enumerate(['.png', '.GIF', '.bmp', '.JPEG', '.jpeg']):
    _write(root / f'train/dog/breed {i}/x{suffix}', 20 * i)
  for i in range(6):
    _write(root / f'train/dog/{i}.PNG', i)
  _write(root / 'train/dog/a/b/c/deep.JPG')
  for i in range(3):
    _write(root / f'val/owl/{i}.jpg')
  (root / 'train/dog/labels.txt').write_text('no image')
  (root / 'train/README.md').write_text('no class')
  _write(root / 'train/dog/._0.jpg')
  _write(root / 'train/.trash/old.jpg')
  return root


def _get(folder, split):
  return core.get(name='bv:image_folder', data_dir=str(folder), split=split)


def test_all_images_with_their_labels_and_bytes(folder, infer):
  source = _get(folder, 'train')
  examples = infer(source)
  assert source.num_examples == len(examples) == 22
  by_name = {e['file_name'].decode(): e for e in examples}
  assert len(by_name) == 22
  assert 'train/dog/a/b/c/deep.JPG' in by_name
  assert 'train/dog/breed 1/x.GIF' in by_name
  for name, example in by_name.items():
    assert example['image'] == (folder / name).read_bytes()
    assert example['label'] == {'cat': 0, 'dog': 1}[name.split('/')[1]]
  assert [e['id'] for e in examples] == list(range(22))


def test_labels_are_those_of_the_classes_of_all_splits(folder, infer):
  assert {e['label'] for e in infer(_get(folder, 'val'))} == {2}
  both = infer(_get(folder, 'val[:2]+train'))
  counts = collections.Counter(int(e['label']) for e in both)
  assert counts == {0: 10, 1: 12, 2: 2}
  assert [e['id'] for e in both] == [0, 1, *range(22)]


def test_training_has_every_image_once_and_every_format_decodes(
  folder, train_epoch
):
  decode = builder.get_preprocess_fn(
    'decode|resize(4)|keep("image", "id", "file_name")'
  )
  examples = train_epoch(_get(folder, 'train'), decode)
  assert sorted(e['id'] for e in examples) == list(range(22))
  assert {e['image'].shape for e in examples} == {(4, 4, 3)}
  bitmap = [e for e in examples if e['file_name'].endswith(b'.bmp')]
  assert (bitmap[0]['image'] == 40).all()


def test_the_order_mixes_classes_and_depends_on_the_names_alone(tmp_path):
  names = [f'{c}/{i}.jpg' for c in ('a', 'b', 'c', 'd') for i in range(50)]
  order = {}
  for copy, listed in {'one': names, 'two': names[::-1]}.items():
    for name in listed:  # Empty files: nothing is decoded here.
      path = tmp_path / copy / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()
    source = _get(tmp_path / copy, 'all')
    order[copy] = [
      source.lookup(i)['file_name'].numpy().decode() for i in range(200)
    ]
  assert order['one'] == order['two']
  assert sorted(order['one']) == sorted(names)
  counts = collections.Counter(name[0] for name in order['one'][:100])
  assert counts.keys() == set('abcd')
  assert max(counts.values()) < 40


def test_slices_are_parts_of_the_whole(folder):
  names = lambda split: [
    source.lookup(i)['file_name'].numpy()
    for source in [_get(folder, split)]
    for i in range(source.num_examples)
  ]
  whole = names('train')
  assert names('train[:80%]') + names('train[80%:]') == whole
  assert names('train[3:5]') == whole[3:5]


def test_without_splits_the_split_is_all(folder, infer):
  source = _get(folder / 'train', 'all[:50%]')
  assert source.num_examples == 11
  for example in infer(source):
    name = example['file_name'].decode()
    assert example['label'] == ['cat', 'dog'].index(name.split('/')[0])


def test_locate_gives_the_path(folder):
  source = _get(folder, 'val')
  name = source.lookup(1)['file_name'].numpy().decode()
  assert source.where(1).endswith(f'val, example 1: {folder}/{name}')


@pytest.mark.parametrize('damage', ['cut off', 'gone'])
@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_an_unreadable_image_is_named_when_it_is_read(
  tmp_path, request, damage, way
):
  for i in range(6):
    _write(tmp_path / f'cat/{i}.png', i)
  source = _get(tmp_path, 'all')
  bad = tmp_path / 'cat/3.png'
  if damage == 'gone':
    bad.unlink()
  else:
    bad.write_bytes(bad.read_bytes()[:40])
  names = lambda features, key: {'file_name': features['file_name']}
  decode = lambda features, key: {'image': tf.io.decode_png(features['image'])}
  read = request.getfixturevalue(way)
  if damage == 'cut off':
    assert len(read(source, names)) == 6  # What is not decoded does not fail.
  with pytest.raises(core.DataError, match=str(bad)):
    read(source, decode)


def test_a_missing_folder_has_a_spec_for_a_dry_run(tmp_path):
  source = _get(tmp_path / 'no', 'train')
  assert f'no folder {tmp_path}/no' in source.missing
  assert f'{tmp_path}/no/SPLIT/CLASS/NAME.jpg' in source.missing
  spec = core.spec_of(source.parse, source.record_spec)
  assert spec == {
    'image': tf.TensorSpec([], tf.string),
    'file_name': tf.TensorSpec([], tf.string),
    'label': tf.TensorSpec([], tf.int64),
    'id': tf.TensorSpec([], tf.int64),
  }


@pytest.mark.parametrize(
  ('files', 'split', 'message'),
  [
    ('', 'train', "unknown split 'train'. Choices: none"),
    ('', 'all', 'holds no folders; expected'),
    ('1.jpg', 'all', 'holds images, but no folders of classes; expected'),
    ('train/1.jpg', 'train', 'train holds images, but no folders of classes'),
    ('train/cat/1.txt', 'train', 'train holds folders, but no images'),
    ('train/c/1.jpg', 'trian', "Did you mean 'train'?"),
    ('cat/1.jpg', 'train', 'CLASS/NAME.jpg for "all"'),
    ('train/c/1.jpg val/c/1.jpg', 'all', 'they are train, val; give one'),
    ('train/c/1.jpg', 'train+tain', "unknown split 'tain'. Did you mean"),
    ('train/c/1.jpg', 'train[', 'expected e.g. "train"'),
    ('train/c/1.jpg', 'train[:0]', 'has no examples'),
  ],
)
def test_mistakes(tmp_path, files, split, message):
  for file in files.split():
    path = pathlib.Path(tmp_path, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  with pytest.raises(ConfigError) as e:
    _get(tmp_path, split)
  assert message in str(e.value)
