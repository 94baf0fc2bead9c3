"""`vit.load`: a big_vision `.npz` into a model, and every way not to fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import traverse_util

from big_vision_dpn.config import ConfigError
from big_vision_dpn.models import vit, vit_weights

CFG = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2, 'patch_size': 4}


def _params(num_classes=5, size=12, seed=0, **kw):
  """Random parameters by name, of a model for size × size images."""
  model = vit.Model(num_classes, **{**CFG, **kw})
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=a.shape).astype(np.float32)
    for name, a in traverse_util.flatten_dict(shapes, sep='/').items()
  }


def _load(init, file, **kw):
  """vit.load, from and to parameters by name."""
  init = traverse_util.unflatten_dict(init, sep='/')
  loaded = vit.load(init, str(file), {'variant': 'mu/4'}, **kw)
  return traverse_util.flatten_dict(loaded, sep='/')


def _check_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == np.float32
    np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture
def saved():
  return _params(seed=1)


@pytest.fixture
def file(tmp_path, saved):
  path = tmp_path / 'vit.npz'
  np.savez(path, **{f'params/{name}': a for name, a in saved.items()})
  return path


def test_round_trip(file, saved):
  _check_equal(_load(_params(), file), saved)


def test_names_without_params_and_a_whole_train_state(tmp_path, saved):
  np.savez(tmp_path / 'bare.npz', **saved)
  _check_equal(_load(_params(), tmp_path / 'bare.npz'), saved)
  np.savez(
    tmp_path / 'state.npz',
    **{f'params/{name}': a for name, a in saved.items()},
    **{f'opt/0/mu/{name}': a for name, a in saved.items()},
    chrono=np.float64(3.5),
  )
  _check_equal(_load(_params(), tmp_path / 'state.npz'), saved)


def test_bfloat16_is_read_back_from_raw_bytes(tmp_path, saved):
  rounded = {name: a.astype(jnp.bfloat16) for name, a in saved.items()}
  np.savez(tmp_path / 'vit.npz', **rounded)
  with np.load(tmp_path / 'vit.npz') as arrays:
    assert arrays['head/kernel'].dtype.str == '|V2'
  expected = {name: a.astype(np.float32) for name, a in rounded.items()}
  _check_equal(_load(_params(), tmp_path / 'vit.npz'), expected)


@pytest.mark.parametrize('size', [8, 20, 48])
def test_posemb_is_resampled(file, saved, size):
  """As scipy's order-1 zoom, which is what big_vision uses."""
  grid, side = saved['pos_embedding'].reshape(3, 3, 8), size // 4
  grid = scipy.ndimage.zoom(grid, (side / 3, side / 3, 1), order=1)
  expected = {**saved, 'pos_embedding': grid.reshape(1, side**2, 8)}
  loaded = _load(_params(size=size), file)
  posemb = loaded.pop('pos_embedding')
  np.testing.assert_allclose(
    posemb, expected.pop('pos_embedding'), rtol=1e-5, atol=1e-6
  )
  _check_equal(loaded, expected)


def test_resampling_a_plane_gives_the_plane():
  def plane(side):
    y, x = np.meshgrid(*2 * [np.linspace(-1, 1, side)], indexing='ij')
    return np.stack([y, x, 2 * x - 3 * y + 1], axis=-1).reshape(1, -1, 3)

  for old, new in ((2, 7), (7, 3), (14, 24)):
    resampled = vit_weights.resample_posemb(
      plane(old).astype(np.float32), new**2
    )
    np.testing.assert_allclose(resampled, plane(new), atol=1e-6)


def test_dont_load_keeps_initial_values(file, saved):
  init = _params(num_classes=7)
  loaded = _load(init, file, dont_load=['head/kernel', 'he.*/bias'])
  heads = {name: init[name] for name in ('head/kernel', 'head/bias')}
  _check_equal(loaded, {**saved, **heads})
  assert 'head/bias' in _load(init, file, dont_load='head/.*')


def test_dont_load_is_of_whole_names(file):
  with pytest.raises(ConfigError, match='head/kernel'):
    _load(_params(num_classes=7), file, dont_load=['head'])


def test_plain_weights_into_a_dpn_model(file, saved):
  init = _params(patch_norm='dual')
  loaded = _load(init, file, dont_load=['embedding/.*'])
  _check_equal(loaded, {n: saved.get(n, init[n]) for n in init})


def test_every_mismatch_is_listed(file):
  init = _params(num_classes=7, pool_type='tok', posemb='sincos2d')
  with pytest.raises(ConfigError) as error:
    _load(init, file)
  lines = str(error.value).split('\n')
  assert lines[0] == f'{file} does not fit the model:'
  assert lines[1:5] == [
    '  cls: missing in the file, (1, 1, 8) in the model',
    '  head/bias: (5,) in the file, (7,) in the model',
    '  head/kernel: (8, 5) in the file, (8, 7) in the model',
    '  pos_embedding: (1, 9, 8) in the file, missing in the model',
  ]
  assert len(lines) == 6
  assert "dont_load, a list of regexes such as 'cls.*'" in lines[5]


def test_posemb_of_a_grid_that_is_not_square(file):
  init = _params()
  init['pos_embedding'] = np.zeros((1, 12, 8), np.float32)
  with pytest.raises(
    ConfigError,
    match=r'pos_embedding: \(1, 9, 8\) in the file, \(1, 12, 8\) in the model',
  ):
    _load(init, file)


def test_files_that_cannot_be_read(tmp_path, file):
  missing = tmp_path / 'no.npz'
  with pytest.raises(ConfigError, match=r'no file .*no\.npz'):
    _load(_params(), missing)
  short = tmp_path / 'short.npz'
  short.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ConfigError, match=r'short\.npz.* no \.npz, or was cut'):
    _load(_params(), short)
