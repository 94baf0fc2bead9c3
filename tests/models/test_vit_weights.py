"""`vit.load`: other stems, grids, layouts, older names; what does not fit."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import traverse_util

from big_vision_dpn.config import ConfigError
from big_vision_dpn.models import vit
from big_vision_dpn.models.patch_embed import cut_patches
from big_vision_dpn.models.vit_resample import resample_posemb, resize_kernel

CFG = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2, 'patch_size': 4}


def _params(num_classes=5, size=12, seed=0, **kw):
  """Random parameters by name, of a model for images of this size."""
  model = vit.Model(num_classes, **{**CFG, **kw})
  h, w = (size, size) if isinstance(size, int) else size
  image = jax.ShapeDtypeStruct((1, h, w, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=a.shape).astype(np.float32)
    for name, a in traverse_util.flatten_dict(shapes, sep='/').items()
  }


def _load(init, file, model_cfg=None, **kw):
  """vit.load, from and to parameters by name."""
  init = traverse_util.unflatten_dict(init, sep='/')
  loaded = vit.load(init, str(file), {**CFG, **(model_cfg or {})}, **kw)
  return traverse_util.flatten_dict(loaded, sep='/')


def _check_equal(actual, expected, atol=0):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == np.float32
    np.testing.assert_allclose(
      actual[name], array, rtol=0, atol=atol, err_msg=name
    )


def _save(tmp_path, arrays):
  np.savez(tmp_path / 'vit.npz', **arrays)
  return tmp_path / 'vit.npz'


@pytest.fixture
def saved():
  return _params(seed=1)


@pytest.fixture
def file(tmp_path, saved):
  return _save(tmp_path, {f'params/{name}': a for name, a in saved.items()})


def _posemb(loaded, h, w):
  return loaded['pos_embedding'].reshape(h, w, 8)


def test_round_trip(file, saved):
  _check_equal(_load(_params(), file), saved)
  _check_equal(_load(_params(), file, image_size=(12, 12)), saved)


@pytest.mark.parametrize(
  'fields',
  [
    dict(patch_norm='dual', pool_type='map', rep_size=True),
    dict(patch_norm='pre_post_posemb', patch_norm_type='rmsnorm'),
    dict(patch_norm='dual', patch_norm_type='no_learnable', scan=True, depth=2),
    dict(sa_norm='post', mlp_norm='pre'),
    dict(sa_norm='pre', mlp_norm='pre_post', depth=2),
    dict(sublayer_norm='normformer', pool_type='tok'),
    dict(sublayer_norm='subln', scan=True),
  ],
)
def test_round_trip_of_every_kind_of_norm(tmp_path, fields):
  saved = _params(seed=1, **fields)
  _check_equal(_load(_params(**fields), _save(tmp_path, saved), fields), saved)


def test_arrays_are_cast_to_the_models_dtype(tmp_path, saved):
  rounded = {name: a.astype(jnp.bfloat16) for name, a in saved.items()}
  expected = {name: a.astype(np.float32) for name, a in rounded.items()}
  _check_equal(_load(_params(), _save(tmp_path, rounded)), expected)


# Position embeddings.


@pytest.mark.parametrize('size', [8, 20, 48])
def test_posemb_is_resampled(file, saved, size):
  side = size // 4
  zoom = (side / 3, side / 3, 1)
  grid = scipy.ndimage.zoom(_posemb(saved, 3, 3), zoom, order=1)
  loaded = _load(_params(size=size), file)
  np.testing.assert_allclose(_posemb(loaded, side, side), grid, atol=1e-6)
  loaded['pos_embedding'] = saved['pos_embedding']
  _check_equal(loaded, saved)


def test_antialiased_posemb(tmp_path):
  saved = _params(size=24)
  loaded = _load(_params(), _save(tmp_path, saved), posemb_antialias=True)
  expected = jax.image.resize(_posemb(saved, 6, 6), (3, 3, 8), 'linear')
  np.testing.assert_allclose(_posemb(loaded, 3, 3), expected, atol=1e-6)


def test_posemb_of_grids_that_are_not_square(tmp_path, file, saved):
  init = _params(size=(8, 20))
  with pytest.raises(ConfigError, match=r'(?s)pos_embedding: .*posemb_grid='):
    _load(init, file)  # 10 patches: of which grid?
  loaded = _load(init, file, image_size=(8, 20))
  expected = resample_posemb(_posemb(saved, 3, 3), (2, 5))
  np.testing.assert_array_equal(_posemb(loaded, 2, 5), expected)

  wide = _save(tmp_path, {**saved, **_params(size=(8, 32), seed=2)})
  grid = _posemb(np.load(wide), 2, 8)
  # Of the length of the model's: the model's grid. Otherwise square.
  for size, grid_of_file in (((8, 32), (2, 8)), ((12, 12), (4, 4))):
    loaded = _load(_params(size=size), wide, image_size=size)
    new = (size[0] // 4, size[1] // 4)
    expected = resample_posemb(grid.reshape(*grid_of_file, 8), new)
    np.testing.assert_array_equal(_posemb(loaded, *new), expected)
  for size in ((12, 12), (16, 16)):
    loaded = _load(
      _params(size=size), wide, image_size=size, posemb_grid=(2, 8)
    )
    new = (size[0] // 4, size[1] // 4)
    expected = resample_posemb(grid, new)
    np.testing.assert_array_equal(_posemb(loaded, *new), expected)
  with pytest.raises(ConfigError, match=r'posemb_grid \(3, 4\): .* 16 posit'):
    _load(init, wide, posemb_grid=(3, 4))


@pytest.mark.parametrize('size', [(12, 12), (8, 20), (20, 20)])
def test_a_row_for_cls_is_added_to_cls(tmp_path, size):
  saved = _params(size=size, pool_type='tok')
  row = np.full((1, 1, 8), 2, np.float32)
  posemb = np.concatenate([row, saved['pos_embedding']], axis=1)
  file = _save(tmp_path, {**saved, 'pos_embedding': posemb})
  loaded = _load(_params(size=size, pool_type='tok'), file, image_size=size)
  _check_equal(loaded, {**saved, 'cls': saved['cls'] + 2})


# Older names.


@pytest.mark.parametrize(
  'posemb',
  ['Transformer/posembed_input/pos_embedding', 'Transformer/pos_embedding'],
)
def test_augreg(tmp_path, posemb):
  """The names of the published files, from before flax's Linen."""
  new = _params(pool_type='tok', depth=12)
  old = {}
  for name, a in new.items():
    name = name.replace('Attention_0', 'Attention_1')
    name = name.replace('LayerNorm_1', 'LayerNorm_2')
    old[name.replace('MlpBlock_0', 'MlpBlock_3')] = a
  old['cls'] = new['cls'] - 3
  row = np.full((1, 1, 8), 3, np.float32)
  old[posemb] = np.concatenate([row, old.pop('pos_embedding')], axis=1)
  file = _save(tmp_path, old)
  loaded = _load(_params(pool_type='tok', depth=12, seed=3), file)
  _check_equal(loaded, new, atol=1e-6)

  pre_logits = {'pre_logits/kernel': np.eye(8), 'pre_logits/bias': np.ones(8)}
  file = _save(tmp_path, old | pre_logits)
  init = _params(pool_type='tok', depth=12)
  with pytest.raises(ConfigError, match=r"dont_load=\['pre_logits/\.\*'\]"):
    _load(init, file)
  _load(init, file, dont_load=['pre_logits/.*'])


def test_pooling_head_without_a_module(tmp_path):
  new = _params(pool_type='map')
  old = {name.removeprefix('MAPHead_0/'): a for name, a in new.items()}
  assert 'probe' in old
  assert 'LayerNorm_0/scale' in old
  init = _params(pool_type='map', seed=2)
  _check_equal(_load(init, _save(tmp_path, old)), new)


def test_todays_names_stay():
  """A norm alone of its kind keeps its number, as others begin at 0 too."""
  from big_vision_dpn.models import vit_weights

  block = {
    f'Transformer/encoderblock_0/{module}/w': np.zeros(1)
    for module in (
      'LayerNorm_1',
      'MultiHeadDotProductAttention_0',
      'MlpBlock_0',
    )
  }
  assert vit_weights._modernize(block).keys() == block.keys()


# Stems.


@pytest.mark.parametrize(
  ('theirs', 'ours'),
  [('none', 'dual'), ('dual', 'none'), ('none', 'post_posemb')],
)
def test_the_stem_of_another_patch_norm(tmp_path, theirs, ours):
  patch = (4, 2)
  saved = _params(patch_norm=theirs, patch_size=patch, seed=1)
  file = _save(tmp_path, saved)
  init = _params(patch_norm=ours, patch_size=patch)
  cfg = {'patch_norm': ours, 'patch_size': patch}
  norms = 'posemb_norm/.*' if 'posemb' in ours else 'embedding/ln.*'
  with pytest.raises(
    ConfigError, match=re.escape(f"allow it by dont_load=['{norms}']")
  ):
    _load(init, file, cfg)
  loaded = _load(init, file, cfg, dont_load=[norms])
  kernels = [
    a[name].reshape(-1, 8)
    for a, norm in ((saved, theirs), (loaded, ours))
    for name in [f'embedding/{"kernel" if norm == "none" else "dense/kernel"}']
  ]
  np.testing.assert_array_equal(*kernels)
  for name in saved.keys() & init.keys():
    np.testing.assert_array_equal(loaded[name], saved[name])
  for name in init:
    if re.fullmatch(norms, name):
      np.testing.assert_array_equal(loaded[name], init[name])


def _stem(params, image, **kw):
  """The embeddings that a model has of one image."""
  model = vit.Model(5, **{**CFG, **kw})
  params = traverse_util.unflatten_dict(params, sep='/')
  _, out = model.apply({'params': params}, jnp.asarray(image[None]))
  return np.asarray(out['stem'])


def test_patches_of_another_size(tmp_path, saved, file):
  """Patches drawn twice as large have the same embeddings."""
  init = _params(size=24, patch_size=8)
  with pytest.raises(ConfigError, match='resized by resize_patch=True'):
    _load(init, file, {'patch_size': 8})
  loaded = _load(init, file, {'patch_size': 8}, resize_patch=True)
  image = np.random.default_rng(0).normal(size=(12, 12, 3)).astype(np.float32)
  np.testing.assert_allclose(
    _stem(loaded, _resize_each_patch(image), patch_size=8),
    _stem(saved, image),
    rtol=1e-4,
    atol=1e-4,
  )


def test_ln0_goes_into_the_kernel_that_is_resized(tmp_path):
  cfg = {'patch_norm': 'dual', 'patch_size': 8}
  saved = _params(patch_norm='dual', seed=1)
  file = _save(tmp_path, saved)
  init = _params(size=24, **cfg)
  with pytest.raises(ConfigError, match='resized by resize_patch=True'):
    _load(init, file, cfg)
  loaded = _load(init, file, cfg, resize_patch=True)

  def embed(params, patches):  # As if they were standardised already.
    x = patches * params['embedding/ln0/scale'] + params['embedding/ln0/bias']
    return x @ params['embedding/dense/kernel'] + params['embedding/dense/bias']

  image = np.random.default_rng(0).normal(size=(12, 12, 3)).astype(np.float32)
  small, large = (
    np.asarray(cut_patches(jnp.asarray(i)[None], (p, p)))
    for i, p in ((image, 4), (_resize_each_patch(image), 8))
  )
  np.testing.assert_allclose(
    embed(loaded, large), embed(saved, small), rtol=1e-4, atol=1e-4
  )
  np.testing.assert_array_equal(loaded['embedding/ln0/scale'], np.ones(192))
  np.testing.assert_array_equal(loaded['embedding/ln0/bias'], np.zeros(192))
  np.testing.assert_array_equal(
    loaded['embedding/ln1/scale'], saved['embedding/ln1/scale']
  )


def _resize_each_patch(image):
  """Patches of 4×4 bilinearly to 8×8."""
  patches = image.reshape(3, 4, 3, 4, 3)
  patches = jax.image.resize(patches, (3, 8, 3, 8, 3), 'linear')
  return patches.reshape(24, 24, 3)


@pytest.mark.parametrize(
  ('theirs', 'ours'), [('none', 'dual'), ('dual', 'none')]
)
def test_another_size_and_another_stem(tmp_path, theirs, ours):
  saved = _params(patch_norm=theirs, seed=1)
  file = _save(tmp_path, saved)
  cfg = {'patch_norm': ours, 'patch_size': 8}
  init = _params(size=24, **cfg)
  options = {'dont_load': ['embedding/ln.*'], 'resize_patch': True}
  loaded = _load(init, file, cfg, **options)
  name = lambda norm: 'kernel' if norm == 'none' else 'dense/kernel'
  kernel = saved[f'embedding/{name(theirs)}'].reshape(4, 4, 3, 8)
  np.testing.assert_array_equal(
    loaded[f'embedding/{name(ours)}'].reshape(8, 8, 3, 8),
    resize_kernel(kernel, (8, 8)),
  )


# Blocks.


def _scanned(loop):
  """Parameters by name, of the same model with its blocks in a scan."""
  block = re.compile(r'(.*/encoderblock)_(\d+)(/.*)')
  layers = collections.defaultdict(dict)
  for name, a in loop.items():
    if match := block.fullmatch(name):
      layers[match[1] + match[3]][int(match[2])] = a
  stacked = {
    name: np.stack([arrays[i] for i in range(len(arrays))])
    for name, arrays in layers.items()
  }
  return {n: a for n, a in loop.items() if not block.fullmatch(n)} | stacked


def test_loop_and_scan(tmp_path):
  loop, cfg = _params(depth=11, seed=1), {'depth': 11}
  scan, init = _scanned(loop), _params(scan=True, **cfg)
  assert scan.keys() == init.keys()
  assert scan['Transformer/encoderblock/LayerNorm_1/bias'].shape == (11, 8)
  for saved in (loop, scan):
    file = _save(tmp_path, saved)
    _check_equal(_load(_params(**cfg), file, cfg), loop)
    _check_equal(_load(init, file, {'scan': True, **cfg}), scan)


def test_another_depth(tmp_path):
  file = _save(tmp_path, _params(depth=3))
  with pytest.raises(
    ConfigError,
    match=r'encoderblock/LayerNorm_0/bias: \(3, 8\) in the file, \(2, 8\) in',
  ):
    _load(_params(depth=2, scan=True), file)
  with pytest.raises(ConfigError, match=r'encoderblock_2/LayerNorm_0/bias: '):
    _load(_params(depth=2), file)


# What does not fit.


def test_dont_load_keeps_initial_values(file, saved):
  init = _params(num_classes=7)
  loaded = _load(init, file, dont_load=['head/kernel', 'he.*/bias'])
  heads = {name: init[name] for name in ('head/kernel', 'head/bias')}
  _check_equal(loaded, {**saved, **heads})
  assert 'head/bias' in _load(init, file, dont_load='head/.*')


def test_dont_load_is_of_whole_names(file):
  with pytest.raises(ConfigError, match='head/kernel'):
    _load(_params(num_classes=7), file, dont_load=['head/k'])


def test_every_mismatch_is_listed(file):
  init = _params(num_classes=7, pool_type='tok', posemb='sincos2d')
  with pytest.raises(ConfigError) as error:
    _load(init, file)
  assert str(error.value).split('\n') == [
    f'{file} does not fit the model:',
    '  cls: missing in the file, (1, 1, 8) in the model',
    '  head/bias: (5,) in the file, (7,) in the model',
    '  head/kernel: (8, 5) in the file, (8, 7) in the model',
    '  pos_embedding: (1, 9, 8) in the file, missing in the model',
    "Change the model; or, to keep the model's initial values and to ignore"
    " what only the file has: dont_load=['cls', 'head/.*', 'pos_embedding'].",
  ]
