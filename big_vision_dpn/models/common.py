"""What the models share: Transformer pieces and position embeddings.

Modules and parameters carry the names of google-research/big_vision, so its
checkpoints load and its regexes over parameter names mean the same here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MlpBlock(nn.Module):
  """Dense, gelu (its tanh approximation), Dense.

  Attributes:
    mlp_dim: size of the hidden layer; None is four times the input's.
    dropout: rate, on the hidden layer.
    dtype_mm: dtype of the matmuls' operands and of the result.
  """

  mlp_dim: int | None = None
  dropout: float = 0.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """Maps (..., d) to (..., d)."""
    options = {
      'kernel_init': nn.initializers.xavier_uniform(),
      'bias_init': nn.initializers.normal(stddev=1e-6),
      'dtype': self.dtype_mm,
    }
    d = x.shape[-1]
    x = nn.Dense(self.mlp_dim or 4 * d, **options)(x)
    x = nn.gelu(x)
    x = nn.Dropout(self.dropout)(x, deterministic)
    return nn.Dense(d, **options)(x)


class Encoder1DBlock(nn.Module):
  """A pre-LN Transformer block: self-attention, then an MLP.

  Attributes:
    mlp_dim: hidden size of the MLP; None is four times the width.
    num_heads: number of attention heads.
    dropout: rate, on the output of each sub-layer and inside the MLP.
    dtype_mm: dtype of the matmuls' operands.
  """

  mlp_dim: int | None = None
  num_heads: int = 12
  dropout: float = 0.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(
    self, x: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Maps (n, l, d) to (n, l, d), and gives what lies between.

    Returns:
      The block's output, and a dict of the sub-layers' outputs `sa` and `mlp`
      and of the residual stream after each, `+sa` and `+mlp`.
    """
    out = {}
    y = nn.LayerNorm(dtype=self.dtype_mm)(x)
    y = out['sa'] = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      kernel_init=nn.initializers.xavier_uniform(),
      deterministic=deterministic,
      dtype=self.dtype_mm,
    )(y, y)
    y = nn.Dropout(self.dropout)(y, deterministic)
    x = out['+sa'] = x + y

    y = nn.LayerNorm(dtype=self.dtype_mm)(x)
    y = out['mlp'] = MlpBlock(
      mlp_dim=self.mlp_dim, dropout=self.dropout, dtype_mm=self.dtype_mm
    )(y, deterministic)
    y = nn.Dropout(self.dropout)(y, deterministic)
    x = out['+mlp'] = x + y
    return x, out


class Encoder(nn.Module):
  """Blocks `encoderblock_0`, `encoderblock_1`, ..., then `encoder_norm`.

  Attributes:
    depth: number of blocks.
    mlp_dim: hidden size of the MLPs; None is four times the width.
    num_heads: number of attention heads.
    dropout: rate, see Encoder1DBlock.
    dtype_mm: dtype of the matmuls' operands.
  """

  depth: int
  mlp_dim: int | None = None
  num_heads: int = 12
  dropout: float = 0.0
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(
    self, x: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Maps (n, l, d) to (n, l, d) float32, and gives what lies between.

    Returns:
      The normalised output, and a dict of what every block gives, `block00`,
      `block01`, ..., and `pre_ln`, the last block's output.
    """
    out = {}
    for layer in range(self.depth):
      x, out[f'block{layer:02d}'] = Encoder1DBlock(
        mlp_dim=self.mlp_dim,
        num_heads=self.num_heads,
        dropout=self.dropout,
        dtype_mm=self.dtype_mm,
        name=f'encoderblock_{layer}',
      )(x, deterministic)
    out['pre_ln'] = x
    return nn.LayerNorm(dtype=jnp.float32, name='encoder_norm')(x), out


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
    init = nn.initializers.xavier_uniform()
    probe = self.param('probe', init, (1, 1, d))
    x = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads, kernel_init=init, dtype=self.dtype_mm
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
