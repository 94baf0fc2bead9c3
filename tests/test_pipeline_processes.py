"""Order, augmentation and mixup are the same on any number of processes.

Each run is one to four real processes, joined by jax.distributed, that mix a
data set read in streams with one of random access.
"""

import json
import pathlib

import numpy as np
import pytest
import several_processes
import tensorflow as tf

STEPS = 12


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """61 images of 20×24 in seven files: an epoch ends within 6 steps."""
  folder = tmp_path_factory.mktemp('png')
  rng = np.random.default_rng(0)
  for i, length in enumerate([11, 4, 9, 12, 5, 13, 7]):
    with tf.io.TFRecordWriter(str(folder / f'{i}.tfrecord')) as writer:
      for _ in range(length):
        image = rng.integers(0, 256, (20, 24, 3), np.uint8)
        label = str(rng.integers(10)).encode()
        writer.write(label + tf.io.encode_png(image).numpy())
  return str(folder)


def _run(folder, processes, **options):
  """Per step, the digests of all rows, in order."""
  options = {
    'folder': folder, 'start': 0, 'steps': STEPS, 'threads': None, **options
  }  # fmt: skip
  worker = str(pathlib.Path(__file__).with_name('pipeline_worker.py'))
  parts = several_processes.run(
    worker, json.dumps(options), processes=processes, devices=4 // processes
  )
  steps = []
  for held in zip(*(p['steps'] for p in parts), strict=True):
    rows = {int(r): v for part in held for r, v in part.items()}
    assert len(rows) == sum(map(len, held)) == 16  # No row is held twice.
    steps.append([rows[r] for r in range(16)])
  return steps


@pytest.fixture(scope='module')
def whole(folder):
  return _run(folder, 1)


def test_rows_differ_in_image_mixup_and_label(whole):
  for step in whole:
    image, mixed, _ = zip(*step, strict=True)
    assert len({*image, *mixed}) >= 30  # Some may be cut to one color.


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_are_one(whole, folder, processes):
  assert _run(folder, processes) == whole


def test_a_start_in_the_middle_on_other_processes(whole, folder):
  # Behind the end of an epoch of both data sets.
  assert _run(folder, 2, start=9, steps=3) == whole[9:]


def test_threads_change_nothing(whole, folder):
  assert _run(folder, 1, threads=1, steps=5) == whole[:5]
