"""A source in a module of the user's."""

import pytest

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core

_MODULE = """
import numpy as np

from big_vision_dpn.datasets import core

def get(n, split='train', *, offset=0):
  x = np.arange(n) + offset
  rows = np.concatenate([
    x[r.start : r.stop] for _, r in core.slice_split(split, {'train': n})
  ])
  return core.from_tensors(f'mine {split}', {'x': rows})
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
  folder = tmp_path / 'package_of_a_user'
  folder.mkdir()
  (folder / '__init__.py').touch()
  (folder / 'data.py').write_text(_MODULE)
  (folder / 'broken.py').write_text('import no_such_module')
  monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_it_is_read_like_any_other(package, request, way):
  source = core.get(
    name='bv:package_of_a_user.data', n=10, offset=5, split='train[50%:]'
  )
  examples = request.getfixturevalue(way)(source)
  assert sorted(e['x'] for e in examples) == list(range(10, 15))


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'name': 'data'}, "data 'bv:package_of_a_user.data' needs 'n'"),
    ({'name': 'data', 'n': 1, 'ofset': 1}, "Did you mean 'offset'"),
    ({'name': 'data', 'n': 1, 'split': 'val'}, "unknown split 'val'"),
    ({'name': 'data', 'n': 0}, 'has no examples'),
    ({'name': 'broken'}, "does not import: No module named 'no_such_module'"),
    ({'name': 'dta'}, 'module package_of_a_user.dta does not import'),
    ({'name': '__init__'}, 'has no function get'),
  ],
)
def test_mistakes(package, data, message):
  name = f'bv:package_of_a_user.{data["name"]}'
  with pytest.raises(ConfigError) as e:
    core.get(**{**data, 'name': name})
  assert message in str(e.value)
