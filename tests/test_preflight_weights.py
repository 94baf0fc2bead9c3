"""`config.model_init` and `config.model_load` before anything is compiled."""

import ml_collections
import numpy as np
import pytest

from big_vision_dpn import checkpoint, preflight, pytree, weights
from big_vision_dpn.models.vit_resample import resample_posemb

MODEL = dict(width=8, depth=1, num_heads=2, patch_size=4)


def _check(size=(8, 16), num_classes=5, **fields):
  pp = (
    f'decode|resize({size})|value_range(-1, 1)'
    f'|onehot({num_classes}, key="label", key_result="labels")'
    '|keep("image", "labels")'
  )
  config = {
    'total_steps': 2,
    'lr': 0.1,
    'num_classes': num_classes,
    'model': MODEL,
    'input': {
      'batch_size': 16,
      'data': dict(name='bv:mnist5k', split='train[:100]'),
      'pp': pp,
    },
    **fields,
  }
  return preflight.check(ml_collections.ConfigDict(config))


@pytest.fixture(scope='module')
def params():
  """Random parameters of a model whose grid of patches is square."""
  rng = np.random.default_rng(0)
  return pytree.map_with_names(
    lambda _, a: rng.normal(size=a.shape).astype(np.float32),
    _check(size=(12, 12)).params_shapes,
  )


@pytest.fixture
def file(tmp_path, params):
  path = str(tmp_path / 'vit.npz')
  weights.write_npz(path, params)
  return path


def test_load_knows_the_grid_of_patches(file, params):
  plan = _check(model_init=file)
  assert not plan.mistakes.messages
  posemb = params['pos_embedding'].reshape(3, 3, 8)
  np.testing.assert_array_equal(
    plan.loaded_params['pos_embedding'].reshape(2, 4, 8),
    resample_posemb(posemb, (2, 4)),
  )


def test_a_run_is_what_another_run_starts_from(tmp_path, params):
  checkpointer = checkpoint.Checkpointer(str(tmp_path))
  checkpointer.save(3, {'params': params, 'opt': []}, {})
  checkpointer.close()
  plan = _check(size=(12, 12), model_init=str(tmp_path))
  assert not plan.mistakes.messages
  expected = pytree.flatten_with_names(params)
  assert plan.loaded_params.keys() == expected.keys()
  for name, a in expected.items():
    np.testing.assert_array_equal(plan.loaded_params[name], a)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(model_init='/no/where.npz'), "model_init: no file or folder '/no/w"),
    (dict(model_load=dict(dont_lod=[])), "Did you mean 'dont_load'"),
    (dict(model_load=dict(image_size=(8, 8))), "'image_size'"),
    (dict(model_load=dict(dont_load=['('])), "'(' is no regular expression"),
    (dict(model_load=dict(dont_load=['hed/.*'])), "'hed/.*' matches no param"),
    (dict(model_load=dict(resize_patch='yes')), "resize_patch is 'yes'; exp"),
    (dict(model_load=dict(posemb_antialias=2)), 'posemb_antialias is 2; exp'),
    (dict(model_load=dict(posemb_grid=3)), 'posemb_grid is 3; expected rows'),
    (dict(model_load=dict(posemb_grid=(2, 3))), 'the file has 9 position emb'),
    (dict(model=dict(MODEL, patch_size=2)), 'resized by resize_patch=True'),
    (
      dict(model=dict(MODEL, patch_norm='dual')),
      "dont_load=['embedding/ln.*']",
    ),
    (dict(num_classes=10), 'head/bias: (5,) in the file, (10,) in the model'),
  ],
)
def test_mistakes(file, fields, message):
  plan = _check(**{'model_init': file, **fields})
  (mistake,) = plan.mistakes.messages
  assert mistake.startswith('config.model_init: ')
  assert message in mistake
