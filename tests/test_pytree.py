"""Names of parameters and regular expressions over them."""

import numpy as np
import pytest

from big_vision_dpn import pytree
from big_vision_dpn.config import ConfigError

TREE = {'head': {'kernel': np.ones(2), 'bias': np.ones(3)}, 'cls': np.ones(1)}


def test_names():
  assert list(pytree.flatten_with_names(TREE)) == [
    'cls',
    'head/bias',
    'head/kernel',
  ]


def test_first_match_wins_and_matches_whole_names():
  values = pytree.first_match(
    'x', TREE, [('head/.*', 1), ('.*kernel', 2), ('c.?.', 3)], default=0
  )
  assert values == {'head/kernel': 1, 'head/bias': 1, 'cls': 3}
  values = pytree.first_match('x', TREE, [('cls', 1)], default=0)
  assert values == {'head/kernel': 0, 'head/bias': 0, 'cls': 1}


@pytest.mark.parametrize('pattern', ['head', 'kernel', '('])
def test_first_match_mistakes(pattern):
  with pytest.raises(ConfigError, match=r'config\.wd_mults'):
    pytree.first_match('wd_mults', TREE, [(pattern, 1)])


def test_l2_norm():
  tree = {'a': np.float32([3]), 'b': np.float32([[4], [12]])}
  np.testing.assert_allclose(pytree.l2_norm(tree), 13)
