"""ImageNet-21k from tiny tars, in the two layouts that the builder accepts."""

import io
import os
import sys
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core, imagenet21k
from big_vision_dpn.datasets.imagenet21k import builder, tars

_WNIDS = ('n00004475', 'n01440764', 'n15102894')
_ON_SITE = '/downloads/manual'


def _image(seed: int, encode=tf.io.encode_jpeg) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
  return encode(pixels).numpy()


# A tar's members by their names; a PNG among JPEGs, as ImageNet has some.
_FILES = {
  wnid: {f'{wnid}_{i}.JPEG': _image(10 * k + i) for i in range(4)}
  | {f'{wnid}_9.JPEG': _image(k, tf.io.encode_png)}
  for k, wnid in enumerate(_WNIDS)
}
_IMAGES = {n: image for files in _FILES.values() for n, image in files.items()}


def _tar(files: dict[str, bytes], **kwargs) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w', **kwargs) as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


def _synset_tars(files=_FILES) -> dict[str, bytes]:
  return {f'{wnid}.tar': _tar(of_it) for wnid, of_it in files.items()}


def _write(path: str, content: bytes) -> str:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'wb') as f:
    f.write(content)
  return path


def _release(**changes) -> imagenet21k.Release:
  fields = {
    'name': 'tiny',
    'description': 'three synsets',
    'archive': 'tiny_whole',
    'num_synsets': 3,
    'num_images': len(_IMAGES),
  }
  return imagenet21k.Release(**fields | changes)


def test_labels_are_those_of_googles_models():
  wnids = imagenet21k.wnids()
  assert len(wnids) == len(set(wnids)) == 21_843
  assert list(wnids) == sorted(wnids)
  # Of these two the fall 2011 release has no image.
  assert {'n03931044', 'n09859684'} < set(wnids)
  assert (wnids[0], wnids[-1]) == ('n00004475', 'n15102894')


@pytest.mark.parametrize(
  ('name', 'size', 'archive'),
  [
    ('imagenet21k', 14_197_122, 'fall11_whole.tar'),
    ('imagenet21k/fall11', 14_197_122, 'fall11_whole.tar'),
    ('imagenet21k/winter21', 13_153_500, 'winter21_whole.tar.gz'),
  ],
)
def test_features_and_instructions_before_preparation(
  name, size, archive, tmp_path
):
  source = core.get(name=name, split='full[51200:]', data_dir=str(tmp_path))
  assert source.num_examples == size - 51_200
  assert f'tools.prepare_data {name} ' in source.missing
  assert archive in source.missing
  assert f'{tmp_path}{_ON_SITE}' in source.missing
  assert core.spec_of(source.parse, source.record_spec) == {
    'image': tf.TensorSpec([], tf.string),
    'label': tf.TensorSpec([], tf.int64),
    'file_name': tf.TensorSpec([], tf.string),
  }


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'name': 'imagenet21', 'split': 'full'}, "Did you mean 'imagenet21k'"),
    ({'name': 'imagenet21k', 'split': 'train'}, 'Choices: full'),
  ],
)
def test_mistakes(data, message, tmp_path):
  with pytest.raises(ConfigError) as e:
    core.get(data_dir=str(tmp_path), **data)
  assert message in str(e.value)


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_is_that_of_pythons_tarfile(form, tmp_path):
  members = {f'./whole/{k}': v for k, v in _synset_tars().items()}
  members |= {'README': b'not a synset', 'x' * 200: b'a long name'}
  path = _write(f'{tmp_path}/t.tar', _tar(members, format=form))
  with tarfile.open(path) as tar:
    expected = [
      tars.Synset(os.path.basename(m.name)[:-4], path, m.offset_data, m.size)
      for m in tar
      if m.name.endswith('.tar')
    ]
  assert tars.index(path) == expected
  images = {n: image for s in expected for n, image in tars.images(s)}
  assert images == _IMAGES


def test_an_index_reaches_beyond_what_a_tar_of_old_holds(tmp_path):
  path = f'{tmp_path}/t.tar'
  with open(path, 'wb') as f:  # With holes, so that it takes no room.
    for wnid, size in zip(_WNIDS, (9_000_000_001, 1, 512), strict=True):
      info = tarfile.TarInfo(f'{wnid}.tar')
      info.size = size
      f.write(info.tobuf(tarfile.GNU_FORMAT))
      f.seek(-(-size // 512) * 512, os.SEEK_CUR)
    f.write(bytes(1024))
  assert [(s.offset, s.size) for s in tars.index(path)] == [
    (512, 9_000_000_001),
    (9_000_001_536, 1),
    (9_000_002_560, 512),
  ]


@pytest.mark.parametrize('depth', ['', '/winter21_whole'])
def test_a_folder_of_tars(depth, tmp_path):
  for name, tar in _synset_tars().items():
    _write(f'{tmp_path}/tiny_whole{depth}/{name}', tar)
  _write(f'{tmp_path}/tiny_whole/other.tar', b'')
  synsets = builder.find_synsets(str(tmp_path), _release())
  assert [s.wnid for s in synsets] == list(_WNIDS)
  assert {n: x for s in synsets for n, x in tars.images(s)} == _IMAGES


# Bytes from the end: within the end mark, just before it (a clean cut between
# two members, which tarfile takes for the end), within a member, its header.
@pytest.mark.parametrize('outer', [True, False])
@pytest.mark.parametrize('missing', ['all marks', 'member', 'header'])
def test_a_tar_that_was_cut_off_is_an_error(outer, missing, tmp_path):
  files = _synset_tars() if outer else _FILES['n01440764']
  whole = _tar(files)
  with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
    last = tar.getmembers()[-1]
  end = last.offset_data + -(-last.size // 512) * 512
  size = {'all marks': end, 'member': end - 600, 'header': last.offset + 100}
  path = _write(f'{tmp_path}/tiny_whole.tar', whole[: size[missing]])
  with pytest.raises(ConfigError, match=r'tiny_whole\.tar'):
    if outer:
      tars.index(path)
    else:
      list(tars.images(tars.Synset('n01440764', path)))


def test_a_compressed_tar_is_an_error_that_says_what_to_do(tmp_path):
  _write(f'{tmp_path}/tiny_whole.tar.gz', b'')
  with pytest.raises(ConfigError, match='still compressed') as e:
    builder.find_synsets(str(tmp_path), _release())
  assert 'gunzip' in str(e.value)


def test_no_tar_is_an_error_with_the_instructions(tmp_path):
  with pytest.raises(ConfigError, match='neither exists') as e:
    builder.find_synsets(str(tmp_path), _release())
  assert f'{tmp_path}/tiny_whole.tar' in str(e.value)
  assert 'image-net.org' in str(e.value)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (dict(list(_FILES.items())[:2]), '2 synsets, but .* has 3'),
    (_FILES | {'n00000001': {}}, 'n00000001 is no synset'),
  ],
)
def test_other_synsets_than_the_release_has(files, message, tmp_path):
  _write(f'{tmp_path}/tiny_whole.tar', _tar(_synset_tars(files)))
  with pytest.raises(ConfigError, match=message):
    builder.find_synsets(str(tmp_path), _release())


@pytest.mark.parametrize(
  ('num_examples', 'max_lost', 'allowed'),
  [
    (15, 0, True),
    (14, 0, False),
    (14, 1, True),
    (13, 1, False),
    (16, 9, False),
  ],
)
def test_count_check(num_examples, max_lost, allowed):
  release = _release(max_lost=max_lost)
  if allowed:
    builder.check_images(release, num_examples, undecodable=0)
    return
  with pytest.raises(ConfigError) as e:
    builder.check_images(release, num_examples, undecodable=None)
  assert f'{num_examples} examples' in str(e.value)
  assert 'has 15 images' in str(e.value)


def test_the_known_releases_are_checked_closely():
  """Losing a thousandth is allowed, a synset is not."""
  releases = imagenet21k.Imagenet21k.builder_configs
  counts = {n: (r.num_synsets, r.num_images) for n, r in releases.items()}
  assert counts == {
    'fall11': (21_841, 14_197_122),
    'winter21': (19_167, 13_153_500),
  }
  assert all(r.max_lost <= r.num_images // 1000 for r in releases.values())


def test_what_counts_as_an_image():
  jpeg = _image(0)
  assert tars.is_image(jpeg)
  assert tars.is_image(_image(0, tf.io.encode_png))
  for broken in (b'', b'<html>', jpeg[: len(jpeg) // 2]):
    assert not tars.is_image(broken)


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  _write(f'{tmp_path}{_ON_SITE}/tiny_whole.tar', _tar(_synset_tars()))
  release = _release(name='without_beam')
  data = imagenet21k.Imagenet21k(config=release, data_dir=str(tmp_path))
  with pytest.raises(ConfigError, match='pip install "apache-beam'):
    data.download_and_prepare()
  assert not os.path.exists(data.data_dir)


def _prepare(folder, files, options=(), **changes):
  """Runs the pipeline on a tar of `files`, and gives the builder."""
  from apache_beam.options.pipeline_options import PipelineOptions

  path = f'{folder}{_ON_SITE}/tiny_whole.tar'
  _write(path, _tar(_synset_tars(files)))
  data = imagenet21k.Imagenet21k(
    config=_release(**changes), data_dir=str(folder)
  )
  flags = ['--runner=DirectRunner', *options]
  config = tfds.download.DownloadConfig(beam_options=PipelineOptions(flags))
  data.download_and_prepare(download_config=config)
  return data


_WORKERS = ('--direct_num_workers=2', '--direct_running_mode=multi_processing')


@pytest.mark.parametrize('options', [(), _WORKERS], ids=['one', 'two_workers'])
def test_prepared_by_beam_and_read_back(options, tmp_path):
  pytest.importorskip('apache_beam')
  broken = {'n01440764_7.JPEG': _image(7)[:-300], 'n01440764_8.JPEG': b''}
  files = _FILES | {'n01440764': _FILES['n01440764'] | broken}
  data = _prepare(tmp_path, files, options, num_images=17, max_lost=2)
  assert data._undecodable == 2

  source = core.get(
    name='imagenet21k/tiny', split='full', data_dir=str(tmp_path)
  )
  assert source.num_examples == len(_IMAGES)
  read = {}
  for record in tf.data.TFRecordDataset([s.path for s in source.shards]):
    example = {k: v.numpy() for k, v in source.parse(record).items()}
    name = example['file_name'].decode()
    read[name] = example['image']
    assert imagenet21k.wnids()[example['label']] == name.partition('_')[0]
  assert read == _IMAGES  # Byte for byte.


def test_a_wrong_count_leaves_nothing_behind(tmp_path):
  pytest.importorskip('apache_beam')
  with pytest.raises(ConfigError, match='15 examples, and the release has 16'):
    _prepare(tmp_path, _FILES, num_images=16)
  source = core.get(name='imagenet21k', split='full', data_dir=str(tmp_path))
  assert source.missing
  assert os.listdir(f'{tmp_path}/imagenet21k/tiny') == []


def test_a_synset_that_was_cut_off_fails_the_pipeline(tmp_path):
  pytest.importorskip('apache_beam')
  whole = _tar(_FILES['n01440764'])
  synsets = _synset_tars() | {'n01440764.tar': whole[: len(whole) // 2]}
  for name, tar in synsets.items():
    _write(f'{tmp_path}{_ON_SITE}/tiny_whole/{name}', tar)
  data = imagenet21k.Imagenet21k(config=_release(), data_dir=str(tmp_path))
  with pytest.raises(Exception, match='no complete tar'):
    data.download_and_prepare()
  assert os.listdir(f'{tmp_path}/imagenet21k/tiny') == []
