"""Losses against their formulas in float64."""

import numpy as np
import pytest

from big_vision_dpn import losses


@pytest.fixture
def data():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 7)) * 4
  labels = rng.dirichlet(np.ones(7), size=5)
  return logits, labels


def test_sigmoid_xent(data):
  logits, labels = data
  p = 1 / (1 + np.exp(-logits))
  expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)
  actual = losses.sigmoid_xent(logits=logits, labels=labels)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_softmax_xent(data):
  logits, labels = data
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -(labels * np.log(p)).sum(-1)
  actual = losses.softmax_xent(logits=logits, labels=labels)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize('name', losses.LOSSES)
def test_extreme_logits_stay_finite(name):
  logits = np.float32([[1e4, -1e4]])
  labels = np.float32([[0.5, 0.5]])
  loss = losses.LOSSES[name](logits=logits, labels=labels)
  np.testing.assert_allclose(loss, [1e4], rtol=1e-6)
