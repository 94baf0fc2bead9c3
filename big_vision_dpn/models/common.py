"""What the models share: Transformer pieces and position embeddings.

Modules and parameters carry the names of google-research/big_vision, so its
checkpoints load and its regexes over parameter names mean the same here.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision_dpn.sharding import constrain

# The axes of the residual stream, for the rules of a sharding.Layout.
STREAM = ('act_batch', 'act_len', 'act_emb')


def xavier_uniform(gain: float = 1.0) -> nn.initializers.Initializer:
  """Uniform of the variance `2 gain² / (fan_in + fan_out)`."""
  return nn.initializers.variance_scaling(gain**2, 'fan_avg', 'uniform')


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array):
  """Softmax attention, (n, l, heads, d) each; the softmax in float32.

  By cuDNN's fused kernel on GPUs that have one for the dtype and the size.
  """
  fused = has_fused_attention(jax.devices()[0], q.dtype, q.shape[-1])
  return jax.nn.dot_product_attention(
    q, k, v, implementation='cudnn' if fused else 'xla'
  )


def has_fused_attention(device: jax.Device, dtype: Any, head_dim: int) -> bool:
  """Whether cuDNN has flash attention for it: bfloat16 from Ampere on."""
  return (
    device.platform == 'gpu'
    and float(getattr(device, 'compute_capability', None) or 0) >= 8
    and dtype == jnp.bfloat16
    and head_dim <= 128
    and head_dim % 8 == 0
  )


class HeadScale(nn.Module):
  """A learned factor for each attention head, (n, l, heads, d) to the same."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-2], 1))
    return x * scale.astype(x.dtype)


class MultiHeadDotProductAttention(nn.Module):
  """Attention with several heads; parameters as flax's module of this name.

  Attributes:
    num_heads: number of attention heads.
    sublayer_norm: 'normformer' scales the heads, 'subln' puts a LayerNorm
      before the output projection; 'none' does neither.
    gain: of the initial values of the values' and the output's projections.
    dtype_mm: dtype of the matmuls' operands and of the result.
  """

  num_heads: int
  sublayer_norm: str = 'none'
  gain: float = 1.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, queries: jax.Array, x: jax.Array) -> jax.Array:
    """Each of the queries (n, m, d) sees x (n, l, d); gives (n, m, d)."""
    d = queries.shape[-1]

    def project(name: str, x: jax.Array, gain: float = 1.0) -> jax.Array:
      return nn.DenseGeneral(
        (self.num_heads, d // self.num_heads),
        kernel_init=xavier_uniform(gain),
        dtype=self.dtype_mm,
        name=name,
      )(x)

    heads = dot_product_attention(
      project('query', queries),
      project('key', x),
      project('value', x, self.gain),
    )
    heads = constrain(heads, 'act_batch', 'act_len', 'act_heads', None)
    if self.sublayer_norm == 'normformer':
      heads = HeadScale()(heads)
    if self.sublayer_norm == 'subln':
      over = {'reduction_axes': (-2, -1), 'feature_axes': (-2, -1)}
      heads = nn.LayerNorm(**over, dtype=self.dtype_mm)(heads)
    return nn.DenseGeneral(
      d,
      axis=(-2, -1),
      kernel_init=xavier_uniform(self.gain),
      dtype=self.dtype_mm,
      name='out',
    )(heads)


class MlpBlock(nn.Module):
  """Dense, gelu (its tanh approximation), Dense.

  Attributes:
    mlp_dim: size of the hidden layer; None is four times the input's.
    dropout: rate, on the hidden layer.
    inner_norm: whether a LayerNorm follows the gelu.
    gain: of the kernels' initial values.
    dtype_mm: dtype of the matmuls' operands and of the result.
  """

  mlp_dim: int | None = None
  dropout: float = 0.0
  inner_norm: bool = False
  gain: float = 1.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """Maps (..., d) to (..., d)."""
    options = {
      'kernel_init': xavier_uniform(self.gain),
      'bias_init': nn.initializers.normal(stddev=1e-6),
      'dtype': self.dtype_mm,
    }
    d = x.shape[-1]
    x = nn.Dense(self.mlp_dim or 4 * d, **options)(x)
    x = nn.gelu(x)
    if x.ndim == 3:
      x = constrain(x, 'act_batch', 'act_len', 'act_mlp')
    if self.inner_norm:
      x = nn.LayerNorm(dtype=self.dtype_mm)(x)
    x = nn.Dropout(self.dropout)(x, deterministic)
    return nn.Dense(d, **options)(x)


# The choices of Encoder1DBlock's fields.
NORM_PLACEMENTS = ('pre', 'post', 'pre_post')
POST_NORMS_AT = ('output', 'residual')
SUBLAYER_NORMS = ('none', 'normformer', 'subln')


class Encoder1DBlock(nn.Module):
  """A Transformer block: self-attention, then an MLP.

  A sub-layer f with its LayerNorms is

      pre               x + f(LN(x))
      post, output      x + LN(f(x))
      post, residual    LN(x + f(x))
      pre_post, …       both

  NormFormer (Shleifer et al., https://arxiv.org/abs/2110.09456) is pre and,
  beyond that, a LayerNorm on the attention's output, a learned factor for each
  head and a LayerNorm after the MLP's gelu; without its optional scaling of the
  residual. Sub-LN (Wang et al., https://arxiv.org/abs/2210.06423) is pre, and a
  LayerNorm before the attention's output projection and one after the gelu.

  Attributes:
    mlp_dim: hidden size of the MLP; None is four times the width.
    num_heads: number of attention heads.
    dropout: rate, on the output of each sub-layer and inside the MLP.
    sa_norm: of NORM_PLACEMENTS, for the self-attention: `LayerNorm_0` before
      it, `PostNorm_0` after.
    mlp_norm: of NORM_PLACEMENTS, for the MLP: `LayerNorm_1`, `PostNorm_1`.
    post_norm_at: of POST_NORMS_AT, for what is after.
    sublayer_norm: of SUBLAYER_NORMS.
    gain: of the initial values of all kernels but the queries' and keys'.
    dtype_mm: dtype of the matmuls' operands.
  """

  mlp_dim: int | None = None
  num_heads: int = 12
  dropout: float = 0.0
  sa_norm: str = 'pre'
  mlp_norm: str = 'pre'
  post_norm_at: str = 'output'
  sublayer_norm: str = 'none'
  gain: float = 1.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    deterministic: bool = True,
    drop_rate: float | jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Maps (n, l, d) to (n, l, d), and gives what lies between.

    Args:
      x: the residual stream.
      deterministic: whether nothing is dropped.
      drop_rate: probability with which a sub-layer is left out for an example
        (stochastic depth); None for never.

    Returns:
      The block's output, and a dict of the sub-layers' outputs `sa` and `mlp`
      and of the residual stream after each, `+sa` and `+mlp`.
    """
    out = {}
    drop_rate = None if deterministic else drop_rate

    y = self._pre_norm(0, self.sa_norm, x)
    y = out['sa'] = MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      sublayer_norm=self.sublayer_norm,
      gain=self.gain,
      dtype_mm=self.dtype_mm,
    )(y, y)
    normformer = self.sublayer_norm == 'normformer'
    placement = 'pre_post' if normformer else self.sa_norm
    x = self._add(0, placement, x, y, deterministic, drop_rate)
    x = out['+sa'] = constrain(x, *STREAM)

    y = self._pre_norm(1, self.mlp_norm, x)
    y = out['mlp'] = MlpBlock(
      mlp_dim=self.mlp_dim,
      dropout=self.dropout,
      inner_norm=self.sublayer_norm != 'none',
      gain=self.gain,
      dtype_mm=self.dtype_mm,
    )(y, deterministic)
    x = self._add(1, self.mlp_norm, x, y, deterministic, drop_rate)
    x = out['+mlp'] = constrain(x, *STREAM)
    return x, out

  def _pre_norm(self, number: int, placement: str, x: jax.Array) -> jax.Array:
    if placement == 'post':
      return x
    return nn.LayerNorm(dtype=self.dtype_mm, name=f'LayerNorm_{number}')(x)

  def _add(
    self,
    number: int,
    placement: str,
    x: jax.Array,
    y: jax.Array,
    deterministic: bool,
    drop_rate: float | jax.Array | None,
  ) -> jax.Array:
    post_at = None if placement == 'pre' else self.post_norm_at
    norm = nn.LayerNorm(dtype=self.dtype_mm, name=f'PostNorm_{number}')
    if post_at == 'output':
      y = norm(y)
    y = nn.Dropout(self.dropout)(y, deterministic)
    if drop_rate is not None:
      y = drop_path(self.make_rng('dropout'), y, drop_rate)
    return norm(x + y) if post_at == 'residual' else x + y


def drop_path(
  rng: jax.Array, x: jax.Array, rate: float | jax.Array
) -> jax.Array:
  """Zeros an example with probability `rate`, else divides by `1 - rate`.

  Source: Huang et al., "Deep Networks with Stochastic Depth",
  https://arxiv.org/abs/1603.09382, with the factor in training.

  Args:
    rng: random key.
    x: (n, l, d).
    rate: in [0, 1).
  """
  keep = jax.random.bernoulli(rng, 1 - rate, (x.shape[0], 1, 1))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# What the backward pass finds in memory: 'none' of recomputation, so all.
REMAT_POLICIES = (
  'none',
  'nothing_saveable',
  'dots_saveable',
  'dots_with_no_batch_dims_saveable',
)


class Encoder(nn.Module):
  """Equal blocks and the LayerNorm `encoder_norm`.

  The blocks' parameters are `encoderblock_0`, `encoderblock_1`, ...; with
  `scan`, `encoderblock`, whose arrays have the depth as their first dimension,
  and which is compiled once. The initial values and what dropout draws are the
  same for both.

  Attributes:
    depth: number of blocks.
    block: makes a block, as Encoder1DBlock does.
    stochastic_depth: probability with which a sub-layer of the last block is
      left out in training; it grows linearly from 0 in the first.
    scan: whether to loop with jax.lax.scan.
    remat_policy: of REMAT_POLICIES, what of a block the backward pass does not
      compute again.
  """

  depth: int
  block: Callable[..., nn.Module]
  stochastic_depth: float = 0.0
  scan: bool = False
  remat_policy: str = 'none'

  @nn.compact
  def __call__(
    self, x: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Maps (n, l, d) to (n, l, d) float32, and gives what lies between.

    Returns:
      The normalised output, and a dict of what every block gives, `block00`,
      `block01`, ..., and `pre_ln`, the last block's output.
    """
    if self.is_initializing():
      self._init_blocks(x)
    apply = self._apply_fn(deterministic)
    blocks = []
    if self.scan:
      layers = (self.get_variable('params', 'encoderblock'), self._layers())
      x, outs = jax.lax.scan(lambda x, layer: apply(x, *layer), x, layers)
      blocks = [_unstack(outs, layer) for layer in range(self.depth)]
    else:
      for layer in range(self.depth):
        params = self.get_variable('params', f'encoderblock_{layer}')
        x, out = apply(x, params, layer)
        blocks.append(out)
    out = {f'block{layer:02d}': block for layer, block in enumerate(blocks)}
    out['pre_ln'] = x
    return nn.LayerNorm(dtype=jnp.float32, name='encoder_norm')(x), out

  def _init_blocks(self, x: jax.Array) -> None:
    block, rng = self.block(parent=None), self.make_rng('params')

    def init(layer):
      return block.init(jax.random.fold_in(rng, layer), x)['params']

    params = jax.lax.map(init, self._layers())
    if self.scan:
      self.put_variable('params', 'encoderblock', params)
      return
    for layer in range(self.depth):
      name = f'encoderblock_{layer}'
      self.put_variable('params', name, _unstack(params, layer))

  def _layers(self) -> jax.Array:
    return jnp.arange(self.depth)

  def _apply_fn(self, deterministic: bool) -> Callable:
    block, rng = self.block(parent=None), None
    if not deterministic and self.has_rng('dropout'):
      rng = self.make_rng('dropout')

    def apply(x, params, layer):
      rngs = {} if rng is None else {'dropout': jax.random.fold_in(rng, layer)}
      drop_rate = None
      if self.stochastic_depth:
        drop_rate = self.stochastic_depth * layer / max(1, self.depth - 1)
      return block.apply(
        {'params': params}, x, deterministic, drop_rate, rngs=rngs
      )

    if self.remat_policy == 'none':
      return apply
    # Within a scan nothing outside it could be merged with the recomputation.
    return jax.checkpoint(
      apply,
      policy=getattr(jax.checkpoint_policies, self.remat_policy),
      prevent_cse=not self.scan,
    )


def _unstack(tree: Any, i: int) -> Any:
  return jax.tree.map(lambda a: a[i], tree)


class MAPHead(nn.Module):
  """Multihead attention pooling: a learned probe attends to the sequence.

  Source: Lee et al., "Set Transformer", https://arxiv.org/abs/1810.00825, in
  the form of Zhai et al., https://arxiv.org/abs/2106.04560.

  Attributes:
    mlp_dim: hidden size of the MLP; None is four times the width.
    num_heads: number of attention heads.
    dtype_mm: dtype of the matmuls' operands and of the result.
  """

  mlp_dim: int | None = None
  num_heads: int = 12
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Pools (n, l, d) into (n, d)."""
    n, _, d = x.shape
    probe = self.param('probe', xavier_uniform(), (1, 1, d))
    x = MultiHeadDotProductAttention(
      num_heads=self.num_heads, dtype_mm=self.dtype_mm
    )(jnp.tile(probe, (n, 1, 1)), x)
    y = nn.LayerNorm(dtype=self.dtype_mm)(x)
    y = MlpBlock(mlp_dim=self.mlp_dim, dtype_mm=self.dtype_mm)(y)
    return (x + y)[:, 0]


def posemb_sincos_2d(
  h: int, w: int, width: int, temperature: float = 10_000.0
) -> jax.Array:
  """Fixed 2-D sine and cosine position embeddings.

  Source: Chen et al., MoCo v3, https://arxiv.org/abs/2104.02057.

  Args:
    h: rows of the grid.
    w: columns of the grid.
    width: size of an embedding, a multiple of 4, at least 8.
    temperature: the longest wavelength over 2π.

  Returns:
    (1, h * w, width) float32: sin and cos of the column, then of the row, at
    width / 4 frequencies from 1 down to 1 / temperature.
  """
  omega = temperature ** -jnp.linspace(0, 1, width // 4)
  rows, columns = jnp.mgrid[:h, :w].reshape(2, -1, 1) * omega
  waves = [jnp.sin(columns), jnp.cos(columns), jnp.sin(rows), jnp.cos(rows)]
  return jnp.concatenate(waves, axis=1)[None]
