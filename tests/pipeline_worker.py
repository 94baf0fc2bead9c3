"""One process of a job that prints the training batches it holds.

    python tests/pipeline_worker.py OPTIONS

OPTIONS is JSON: folder (of TFRecord files with PNG images), start, steps,
threads. The output is JSON: for each of `steps`, the global batch's rows that
this process holds -> digests of the row's image, as preprocessed and as mixed
up, and its label.
"""

import hashlib
import json
import os
import sys

import jax
import numpy as np
import tensorflow as tf

from big_vision_dpn import config, input_pipeline, sharding
from big_vision_dpn.datasets import core, tfrecord
from big_vision_dpn.pp import builder
from big_vision_dpn.tasks import classification

BATCH = 16
PP = (
  'decode|inception_crop(16)|flip_lr|randaug(2, 1)|value_range(-1, 1)'
  '|keep("image", "label")'
)
OPTIONS = {
  'batch_size': BATCH,
  'max_in_memory_gb': 0,
  'streams': 64,
  'prefetch': 2,
  'shuffle_buffer_size': 30,
  'cache_raw': False,
  'cache_final': False,
  'skip_errors': False,
}


def read_in_streams(folder: str) -> core.Source:
  """Images in TFRecord files; a record is the label, one digit, and a PNG."""
  paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
  lengths = [sum(1 for _ in tf.data.TFRecordDataset(p)) for p in paths]
  return core.Source(
    name='images',
    parse=lambda r: {
      'image': tf.strings.substr(r, 1, -1),
      'label': tf.strings.to_number(tf.strings.substr(r, 0, 1), tf.int64),
    },
    record_spec=tf.TensorSpec([], tf.string),
    num_examples=sum(lengths),
    num_bytes=1,
    shards=tuple(
      tfrecord.Shard(path, 0, n) for path, n in zip(paths, lengths, strict=True)
    ),
  )


def main(folder: str, start: int, steps: int, threads: int | None) -> None:
  sharding.initialize_processes()
  builder.import_ops(config.FIELDS['pp_modules'].default)
  layout = sharding.Layout()
  preprocess = builder.get_preprocess_fn(PP)
  permuted = core.get(name='bv:mnist5k', split='train[:40]')
  batches = input_pipeline.training(
    [
      input_pipeline.Part(read_in_streams(folder), preprocess, OPTIONS, 2),
      input_pipeline.Part(permuted, preprocess, OPTIONS, 1),
    ],
    OPTIONS | {'threads': threads},
    seed=7,
    start_step=start,
    rows=layout.local_rows(BATCH),
  )

  @jax.jit
  def finish(batch, step):
    image = preprocess.on_device(batch)['image']
    rng = jax.random.fold_in(jax.random.key(7), step)
    return image, *classification.mixup(rng, 0.5, image)

  output = []
  for step in range(start, start + steps):
    batch = layout.put_batch(next(batches))
    output.append(_rows(*finish(batch, step), batch['label']))
  print(json.dumps({'steps': output}))


def _rows(*arrays: jax.Array) -> dict[int, list[str]]:
  rows = {}
  for array in arrays:
    for shard in array.addressable_shards:
      for row, value in enumerate(np.asarray(shard.data), shard.index[0].start):
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        rows.setdefault(row, []).append(digest[:16])
  return rows


if __name__ == '__main__':
  main(**json.loads(sys.argv[1]))
