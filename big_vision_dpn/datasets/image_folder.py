"""Folders of images, one for each class: DATA_DIR/SPLIT/CLASS/**/NAME.jpg.

The layout of torchvision's and TFDS's ImageFolder. A folder without splits,
DATA_DIR/CLASS/**/NAME.jpg, is the one split "all".
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent import futures

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core

# What tf.io.decode_image reads.
_ENDINGS = ('.jpg', '.jpeg', '.png', '.gif', '.bmp')
# No names of classes: such folders are not taken for those of "all".
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
# Lists remote folders, each of which takes a while to answer, side by side.
_THREADS = 32


def get(data_dir: str, split: str) -> core.Source:
  """A split of a folder of images.

  Args:
    data_dir: the folder, local or gs://. Below a class there may be further
      folders. Files that are no .jpg, .jpeg, .png, .gif or .bmp, in lower or
      upper case, are ignored, and so is what begins with a dot. A process
      lists a folder once: it does not see images that are added later.
    split: in TFDS's slicing language over the names of the folders in
      data_dir; "all", or a slice of it, where those are the classes. The order
      is that of a hash of the file names. It is the same on every machine and
      no class comes before another, so that "all[:80%]" and "all[80%:]" each
      have images of all classes.

  Returns:
    The source. Features: `image`, the bytes of the file; `label`, int64, the
    place of its class among the sorted names of the class folders of all
    splits, empty ones too; `file_name`, the path below data_dir; `id`, int64,
    the place in the whole split. Without the folder it is `missing`.

  Raises:
    ConfigError: no such split, or no classes or images in it.
  """
  root = os.path.expanduser(data_dir).rstrip('/')
  name = f'image_folder {data_dir} {split}'
  if not tf.io.gfile.isdir(root):
    return core.Source(
      name=name,
      parse=functools.partial(_parse, root),
      record_spec={
        'file_name': tf.TensorSpec([], tf.string),
        'label': tf.TensorSpec([], tf.int64),
        'id': tf.TensorSpec([], tf.int64),
      },
      num_examples=None,
      missing=f'there is no folder {root}; expected {_layouts(root)}',
    )
  try:
    table = _table(root, split)
  except (tf.errors.OpError, UnicodeDecodeError) as e:
    raise ConfigError(f'cannot list {root}: {e}') from e
  return core.Source(
    name=name,
    parse=functools.partial(_parse, root),
    record_spec={k: tf.TensorSpec([], v.dtype) for k, v in table.items()},
    num_examples=len(table['id']),
    lookup=core.row_of(table),
    locate=lambda index: (
      f'{name}, example {index}: '
      + os.path.join(root, table['file_name'][index].numpy().decode())
    ),
  )


def classes(data_dir: str) -> tuple[str, ...]:
  """The names of the classes, sorted, of all splits; a label is a place here.

  Raises:
    ConfigError: there is no such folder.
  """
  root = os.path.expanduser(data_dir).rstrip('/')
  if not tf.io.gfile.isdir(root):
    raise ConfigError(f'there is no folder {root}; expected {_layouts(root)}')
  return _union(root, _folders(root))


def _parse(root: str, record: core.Features) -> core.Features:
  path = tf.strings.join([f'{root}/', record['file_name']])
  return {**record, 'image': tf.io.read_file(path)}


def _layouts(root: str) -> str:
  return f'{root}/SPLIT/CLASS/NAME.jpg, or {root}/CLASS/NAME.jpg for "all"'


def _table(root: str, split: str) -> dict[str, tf.Tensor]:
  """The features of the split, all but the images."""
  # A folder called "all" is a split like any other.
  top = _folders(root)
  wanted = {term.partition('[')[0].strip() for term in split.split('+')}
  if wanted == {'all'} and 'all' not in top:
    _check_classes(root, top)
    classes, depth, parents = top, 0, {'all': ''}
  else:
    classes, depth = _union(root, top), 1
    parents = {name: f'{name}/' for name in top}
  files = {
    name: _images(root, parent) if name in wanted else ()
    for name, parent in parents.items()
  }
  try:
    terms = core.slice_split(split, {k: len(v) for k, v in files.items()})
  except ConfigError as e:
    raise ConfigError(f'{e} Expected {_layouts(root)}') from e
  label_of = {name: label for label, name in enumerate(classes)}
  names = [files[name][i] for name, part in terms for i in part]
  labels = [label_of[name.split('/')[depth]] for name in names]
  ids = [np.arange(part.start, part.stop) for _, part in terms]
  return {
    'file_name': tf.constant(names, tf.string),
    'label': tf.constant(labels, tf.int64),
    'id': tf.constant(np.concatenate(ids), tf.int64),
  }


def _check_classes(root: str, folders: tuple[str, ...]) -> None:
  """Raises ConfigError where the folders are splits, so that "all" is wrong."""
  if folders and {f.lower() for f in folders} <= _SPLITS:
    raise ConfigError(
      f'split "all" takes the folders in {root} for classes, but they are'
      f' {", ".join(folders)}; give one of these as the split'
    )


def _union(root: str, splits: tuple[str, ...]) -> tuple[str, ...]:
  """The sorted classes of all splits."""
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(lambda name: _folders(f'{root}/{name}'), splits)
    return tuple(sorted(set().union(*found)))


def _folders(path: str) -> tuple[str, ...]:
  """The sorted names of the folders in a folder."""
  return tuple(sorted(name for name, kind in _list(path) if kind == 'folder'))


@functools.lru_cache(maxsize=64)
def _images(root: str, parent: str) -> tuple[str, ...]:
  """The paths below `root` of the images of a split, in our order.

  Args:
    root: the folder of the data set.
    parent: the folder that holds the classes, "SPLIT/" or "".
  """
  folder = f'{root}/{parent}'.rstrip('/')
  classes = _folders(folder)
  if not classes:
    flat = any(kind == 'image' for _, kind in _list(folder))
    holds = 'images, but no folders of classes' if flat else 'no folders'
    raise ConfigError(f'{folder} holds {holds}; expected {_layouts(root)}')
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    walks = pool.map(lambda c: list(_walk(root, f'{parent}{c}')), classes)
    names = [name for walk in walks for name in walk]
  if not names:
    raise ConfigError(
      f'{folder} holds folders, but no images; expected {_layouts(root)},'
      f' with one of the endings {", ".join(_ENDINGS)}'
    )
  return tuple(sorted(names, key=_hash))


def _hash(name: str) -> tuple[bytes, str]:
  return hashlib.blake2b(name.encode(), digest_size=8).digest(), name


def _walk(root: str, folder: str) -> Iterator[str]:
  """The paths below `root` of all images in a folder and its folders."""
  for name, kind in _list(f'{root}/{folder}'):
    if kind == 'image':
      yield f'{folder}/{name}'
    else:
      yield from _walk(root, f'{folder}/{name}')


def _list(path: str) -> Iterator[tuple[str, str]]:
  """The names in a folder, each with its kind: "image" or "folder".

  Not gfile.walk, which asks of every file whether it is a folder; on gs:// that
  is a request for each image. There the names of folders end in a slash.
  """
  for entry in tf.io.gfile.listdir(path):
    name = entry.rstrip('/')
    if name.startswith('.'):
      continue
    if entry.lower().endswith(_ENDINGS):
      yield name, 'image'
    elif entry.endswith('/') or tf.io.gfile.isdir(f'{path}/{name}'):
      yield name, 'folder'
