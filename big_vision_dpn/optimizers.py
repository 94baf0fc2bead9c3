"""The optimizers that `config.optax_name` names, with big_vision's names.

Each turns gradients into updates of learning rate 1; see optim.py for the rest.
"""

import re
from typing import Any

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from big_vision_dpn import pytree


def momentum_hp(
  momentum: float = 0.9, dtype: str = 'bfloat16', nesterov: bool = False
) -> optax.GradientTransformation:
  """SGD with momentum, whose accumulator has `dtype`."""
  return optax.trace(decay=momentum, accumulator_dtype=dtype, nesterov=nesterov)


def scale_by_adafactor(
  min_dim_size_to_factor: int = 32,
  decay_rate: float = 0.8,
  decay_offset: int = 0,
  beta2_cap: float = 0.999,
  clipping_threshold: float | None = None,
  momentum: float | None = 0.9,
  dtype_momentum: str = 'bfloat16',
  eps: float = 1e-30,
) -> optax.GradientTransformation:
  """Adafactor as in Zhai et al., https://arxiv.org/abs/2106.04560, section 3.4.

  Second moments are factored over the two largest dimensions, and decay by
  1 - t^(-decay_rate) up to `beta2_cap`, t counting from 1.

  Args:
    min_dim_size_to_factor: both dimensions must have this size.
    decay_rate: see above.
    decay_offset: steps by which t is behind, for finetuning.
    beta2_cap: the largest decay of second moments.
    clipping_threshold: largest root mean square of a parameter's update.
    momentum: decay of the average of updates; None for none.
    dtype_momentum: of that average.
    eps: added to squared gradients.
  """
  decay = lambda step, rate: jnp.minimum(
    beta2_cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -rate
  )
  chain = [
    optax.scale_by_factored_rms(
      factored=True,
      decay_rate=decay_rate,
      step_offset=decay_offset,
      min_dim_size_to_factor=min_dim_size_to_factor,
      epsilon=eps,
      decay_rate_fn=decay,
    )
  ]
  if clipping_threshold:
    chain.append(optax.clip_by_block_rms(clipping_threshold))
  if momentum:
    chain.append(
      optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum)
    )
  return optax.chain(*chain)


# The matrices within Transformer blocks, which Muon is for: their inputs' and
# outputs' dimensions, from the end, as a scan's come first.
_MATRICES = {
  r'.*/(query|key|value)/kernel': MuonDimensionNumbers((-3,), (-2, -1)),
  r'.*/out/kernel': MuonDimensionNumbers((-3, -2), (-1,)),
  r'.*/MlpBlock_0/Dense_\d/kernel': MuonDimensionNumbers((-2,), (-1,)),
}


def _muon_dimensions(params: Any) -> Any:
  def dimensions(name, _):
    found = (d for regex, d in _MATRICES.items() if re.fullmatch(regex, name))
    return next(found, None)

  return pytree.map_with_names(dimensions, params)


def muon(
  beta: float = 0.95,
  ns_steps: int = 5,
  nesterov: bool = True,
  consistent_rms: float | None = 0.2,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Muon for the matrices within Transformer blocks, Adam for the rest.

  Source: Jordan et al., "Muon"; Liu et al., https://arxiv.org/abs/2502.16982,
  whose `consistent_rms` makes a learning rate mean the same to both.

  Args:
    beta: decay of Muon's momentum.
    ns_steps: Newton-Schulz iterations.
    nesterov: form of the momentum.
    consistent_rms: root mean square of a matrix' update; None scales it by
      √max(1, outputs / inputs).
    b1: decay of Adam's first moments.
    b2: decay of Adam's second moments.
    eps: of both.
    mu_dtype: of first moments and momentum; None for the parameters'.
  """
  updates = optax.contrib.muon(
    learning_rate=1.0,
    ns_steps=ns_steps,
    beta=beta,
    eps=eps,
    mu_dtype=mu_dtype,
    nesterov=nesterov,
    adam_b1=b1,
    adam_b2=b2,
    muon_weight_dimension_numbers=_muon_dimensions,
    consistent_rms=consistent_rms,
  )
  return optax.chain(updates, optax.scale(-1.0))  # Of a descent.


OPTIMIZERS = {
  'identity': optax.identity,
  'scale_by_adam': optax.scale_by_adam,
  'scale_by_lion': optax.scale_by_lion,
  'muon': muon,
  'big_vision.momentum_hp': momentum_hp,
  'big_vision.scale_by_adafactor': scale_by_adafactor,
}
