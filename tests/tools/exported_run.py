"""A workdir with random weights, as a run would leave it, for tests."""

import jax
import ml_collections
import numpy as np

from big_vision_dpn import checkpoint, preflight

IMAGE = (12, 18, 3)
MODEL = dict(
  patch_size=(4, 6),
  width=24,
  depth=2,
  mlp_dim=40,
  num_heads=3,
  head_zeroinit=False,
)


def make(workdir, **model):
  """Writes it; returns the model and its parameters."""
  config = ml_collections.ConfigDict(
    dict(
      total_steps=10,
      num_classes=10,
      lr=0.1,
      input=dict(
        data=dict(name='bv:mnist5k', split='train'),
        batch_size=8,
        pp=f'decode|resize({IMAGE[:2]})|value_range(-1, 1)'
        '|onehot(10, key="label", key_result="labels")',
      ),
      model={**MODEL, **model},
    ),
    type_safe=False,
  )
  plan = preflight.check(config)
  assert plan.mistakes.messages == []
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(0.1, 0.3, a.shape).astype(a.dtype), plan.params_shapes
  )
  checkpoint.write_config(str(workdir), plan.config)
  checkpointer = checkpoint.Checkpointer(str(workdir))
  checkpointer.save(7, {'params': jax.device_put(params)}, {})
  checkpointer.close()
  return plan.task.model, params


def images(n=3):
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (n, *IMAGE)).astype(np.float32)


def logits(model, params):
  return np.asarray(model.apply({'params': params}, images())[0])
