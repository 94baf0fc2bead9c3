"""`weights`: reading from every place, writing, and what does not fit."""

import contextlib
import functools
import http.server
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from big_vision_dpn import checkpoint, weights
from big_vision_dpn.config import ConfigError


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {'head/kernel': (3, 2), 'head/bias': (2,), 'img/cls': (1, 1, 3)}
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def _check_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype
    np.testing.assert_array_equal(actual[name], array, err_msg=name)


def _save(path, arrays, prefix=''):
  np.savez(path, **{prefix + name: a for name, a in arrays.items()})
  return str(path)


@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/'])
def test_npz(tmp_path, prefix):
  path = _save(tmp_path / 'a.npz', _arrays(), prefix)
  _check_equal(weights.read(path), _arrays())


def test_a_whole_train_state_has_more_than_parameters(tmp_path):
  state = {f'params/{name}': a for name, a in _arrays().items()}
  state |= {f'opt/0/mu/{name}': a for name, a in _arrays(1).items()}
  path = _save(tmp_path / 'a.npz', {**state, 'chrono': np.float64(3.5)})
  _check_equal(weights.read(path), _arrays())


def test_bfloat16_is_read_back_from_raw_bytes(tmp_path):
  arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in _arrays().items()}
  path = _save(tmp_path / 'a.npz', arrays)
  with np.load(path) as file:
    assert file['head/kernel'].dtype.str == '|V2'
  _check_equal(weights.read(path), arrays)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors(tmp_path, dtype):
  arrays = {n: a.astype(dtype) for n, a in _arrays().items()}
  path = str(tmp_path / 'model.safetensors')
  safetensors.numpy.save_file(arrays, path)
  _check_equal(weights.read(path), arrays)


def test_write_and_read(tmp_path):
  arrays = {**_arrays(), 'b': np.ones(3, ml_dtypes.bfloat16)}
  path = str(tmp_path / 'new' / 'folder' / 'a.npz')
  for _ in range(2):  # Over the first as well.
    weights.write_npz(path, arrays)
  with np.load(path) as file:
    assert sorted(file.files) == [f'params/{n}' for n in sorted(arrays)]
  _check_equal(weights.read(path), arrays)
  assert [p.name for p in (tmp_path / 'new' / 'folder').iterdir()] == ['a.npz']

  nested = {'head': {'bias': jnp.arange(2.0)}}
  weights.write_npz(path, nested)
  _check_equal(weights.read(path), {'head/bias': np.float32([0, 1])})


def test_subtree(tmp_path):
  expected = {'cls': _arrays()['img/cls']}
  path = _save(tmp_path / 'a.npz', _arrays(), 'params/')
  _check_equal(weights.read(f'{path}:img'), expected)
  with pytest.raises(
    ConfigError, match=r"subtree 'im'.*Did you mean 'img'.*head, img"
  ):
    weights.read(f'{path}:im')

  torch = str(tmp_path / 'model.safetensors')
  safetensors.numpy.save_file({'vision.cls': expected['cls']}, torch)
  _check_equal(weights.read(f'{torch}:vision'), expected)

  odd = _save(tmp_path / 'a:b.npz', _arrays())
  _check_equal(weights.read(odd), _arrays())
  _check_equal(weights.read(f'{odd}:img'), expected)


@pytest.mark.parametrize(
  ('source', 'path', 'subtree'),
  [
    ('a.npz', 'a.npz', ''),
    ('a.npz:img', 'a.npz', 'img'),
    ('a.npz:img/Transformer/', 'a.npz', 'img/Transformer'),
    ('/runs/one', '/runs/one', ''),
    ('/runs/one:img', '/runs/one', 'img'),
    ('gs://b/a.npz', 'gs://b/a.npz', ''),
    ('gs://b/a.npz:img', 'gs://b/a.npz', 'img'),
    ('https://h:80/a.npz', 'https://h:80/a.npz', ''),
    ('https://h:80/a.npz:img', 'https://h:80/a.npz', 'img'),
    ('https://h/a.npz?download=true', 'https://h/a.npz?download=true', ''),
  ],
)
def test_colons(source, path, subtree):
  assert weights._split(source) == (path, subtree)


def test_addresses_that_tensorflow_reads():
  weights.write_npz('ram://folder/a.npz', _arrays())
  _check_equal(weights.read('ram://folder/a.npz'), _arrays())
  with pytest.raises(ConfigError, match=r'cannot read ram://folder/b\.npz'):
    weights.read('ram://folder/b.npz')
  with pytest.raises(ConfigError, match='cannot read nosuch://a'):
    weights.read('nosuch://a/b.npz')


class _Handler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_GET(self):
    if self.path != '/cut.npz':
      return super().do_GET()
    self.send_response(200)
    self.send_header('Content-Length', '1000')
    self.end_headers()
    self.wfile.write(b'PK')


@contextlib.contextmanager
def _served(folder):
  handler = functools.partial(_Handler, directory=str(folder))
  with http.server.ThreadingHTTPServer(('localhost', 0), handler) as server:
    threading.Thread(target=server.serve_forever).start()
    yield f'http://localhost:{server.server_port}'
    server.shutdown()


def test_the_web(tmp_path):
  _save(tmp_path / 'a.npz', _arrays())
  with _served(tmp_path) as address:
    _check_equal(weights.read(f'{address}/a.npz'), _arrays())
    _check_equal(weights.read(f'{address}/a.npz?download=true'), _arrays())
    assert weights.read(f'{address}/a.npz:img').keys() == {'cls'}
    with pytest.raises(ConfigError, match=r'cannot read .*/b\.npz: .*404'):
      weights.read(f'{address}/b.npz')
    with pytest.raises(ConfigError, match='ended at byte 2 of 1,000'):
      weights.read(f'{address}/cut.npz')
  with pytest.raises(ConfigError, match=r'cannot read .*/a\.npz'):
    weights.read(f'{address}/a.npz')


def _nested():
  return {'head': {'bias': jnp.arange(2.0)}, 'img': {'cls': jnp.ones(3)}}


@pytest.fixture
def workdir(tmp_path):
  checkpointer = checkpoint.Checkpointer(str(tmp_path / 'run'))
  for step in (5, 10):
    params = {**_nested(), 'step': jnp.full((), step, jnp.bfloat16)}
    opt = [{'mu': _nested()}, None]
    checkpointer.save(step, {'params': params, 'opt': opt}, {})
  checkpointer.close()
  return tmp_path / 'run'


def test_checkpoints(workdir):
  expected = {'head/bias': np.float32([0, 1]), 'img/cls': np.ones(3, 'f')}
  step = lambda n: {'step': ml_dtypes.bfloat16(n)}
  _check_equal(weights.read(str(workdir)), expected | step(10))
  of_5 = str(workdir / 'checkpoints' / '5')
  _check_equal(weights.read(of_5), expected | step(5))
  _check_equal(weights.read(f'{workdir}:img'), {'cls': np.ones(3, 'f')})
  assert isinstance(weights.read(of_5)['head/bias'], np.ndarray)


def test_folders_without_a_whole_checkpoint(tmp_path, workdir):
  with pytest.raises(ConfigError, match=r'no checkpoint in .*expected'):
    weights.read(str(tmp_path))
  for file in (workdir / 'checkpoints' / '10' / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(
    ConfigError, match=r'(?s)checkpoints/10 is damaged.*Name another one'
  ):
    weights.read(str(workdir))


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(ConfigError, match=r'no file or folder .*no\.npz'):
    weights.read(str(tmp_path / 'no.npz'))
  path = _save(tmp_path / 'a.npz', _arrays())
  safetensors.numpy.save_file(_arrays(), tmp_path / 'a.safetensors')
  page = tmp_path / 'page.npz'
  page.write_text('<html>not here</html>')
  objects = _save(tmp_path / 'objects.npz', {'a': np.array([None])})
  for file in (path, tmp_path / 'a.safetensors'):
    with open(file, 'rb') as f:
      content = f.read()
    with open(file, 'wb') as f:
      f.write(content[:-50])
  for file in (path, tmp_path / 'a.safetensors', page, objects):
    with pytest.raises(ConfigError, match=r'is no .npz .*or was cut short'):
      weights.read(str(file))


def test_merge():
  loaded = {'a/w': np.float32([1.5]), 'b': np.float32([2])}
  init = {'a': {'w': np.zeros(1, ml_dtypes.bfloat16)}, 'c': np.zeros(3)}
  merged = weights.merge_params(loaded, init, ['[bc]'])
  assert merged['c'] is init['c']
  assert merged['a']['w'].dtype == ml_dtypes.bfloat16
  assert merged['a']['w'] == 1.5
  with pytest.raises(ConfigError, match=r"dont_load: '\(' is no regular exp"):
    weights.merge_params(loaded, init, ['('])
  with pytest.raises(ConfigError, match='dont_load: 3 is no regular exp'):
    weights.merge_params(loaded, init, [3])
  with pytest.raises(ConfigError, match=r"'hed/.*' matches no .*: a/w, b, c"):
    weights.merge_params(loaded, init, ['[bc]', 'hed/.*'])


def test_the_dont_load_of_a_message_is_what_is_needed():
  shapes = lambda **kw: {
    n.replace('_', '/'): np.zeros(s) for n, s in kw.items()
  }
  loaded = shapes(a_b_c=1, a_b_d=2, a_e=3, f=4, g_h=5)
  init = {'a': {'b': {'c': np.zeros(2)}, 'e': np.zeros(3)}, 'g': np.zeros(5)}
  with pytest.raises(ConfigError) as error:
    weights.merge_params(loaded, init, source='x.npz', hints={'f': 'No f!'})
  lines = str(error.value).splitlines()
  assert lines == [
    'x.npz does not fit the model:',
    '  a/b/c: (1,) in the file, (2,) in the model',
    '  a/b/d: (2,) in the file, missing in the model',
    '  f: (4,) in the file, missing in the model',
    '  g: missing in the file, (5,) in the model',
    '  g/h: (5,) in the file, missing in the model',
    'No f!',
    "Change the model; or, to keep the model's initial values and to ignore"
    " what only the file has: dont_load=['a/b/.*', 'f', 'g', 'g/.*'].",
  ]
  merged = weights.merge_params(loaded, init, ['a/b/.*', 'f', 'g', 'g/.*'])
  assert merged['a']['b']['c'] is init['a']['b']['c']
