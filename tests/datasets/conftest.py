"""Sources as the input pipeline reads them."""

import pytest

from big_vision_dpn import input_pipeline

_OPTIONS = {
  'batch_size': 4,
  'max_in_memory_gb': 1.0,
  'streams': 4,
  'threads': None,
  'prefetch': 1,
}
_OWN = {
  'shuffle_buffer_size': 100,
  'cache_raw': False,
  'cache_final': False,
  'skip_errors': False,
}


def _rows(batches, n):
  rows = [
    {key: value[i] for key, value in batch.items()}
    for batch in batches
    for i in range(4)
    if batch.get('_mask', [1] * 4)[i]
  ]
  return rows[:n]


@pytest.fixture
def train_epoch():
  """(source, preprocess) -> the examples of one epoch, in random order."""

  def read(source, preprocess=lambda features, key: features):
    part = input_pipeline.Part(source, preprocess, _OWN)
    batches = input_pipeline.training(
      [part], _OPTIONS, seed=0, start_step=0, rows=range(4)
    )
    n = source.num_examples
    return _rows([next(batches) for _ in range(-(-n // 4))], n)

  return read


@pytest.fixture
def infer():
  """(source, preprocess) -> all examples in order."""

  def read(source, preprocess=lambda features, key: features):
    start = input_pipeline.inference(
      source, preprocess, _OPTIONS, batch_size=4, rows=range(4)
    )
    return _rows(list(start()), source.num_examples)

  return read
