"""The Vision Transformer, with or without Dual PatchNorm.

The interface is that of a big_vision model module: `Model(...)` gives the flax
module and `load(...)` its pretrained parameters. Parameter names are
big_vision's too; DPN (`patch_norm='dual'`) changes those under `embedding`
alone, see patch_embed.py.

Sources: Dosovitskiy et al., https://arxiv.org/abs/2010.11929; variants from
Table 2 of Zhai et al., https://arxiv.org/abs/2106.04560, and later ones.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from big_vision_dpn import config
from big_vision_dpn.models import common
from big_vision_dpn.models.patch_embed import (
  PATCH_NORM_TYPES,
  PATCH_NORMS,
  PatchEmbed,
)
from big_vision_dpn.models.vit_weights import load as load
from big_vision_dpn.sharding import constrain

# Width, depth, mlp_dim, num_heads.
VARIANTS = {
  'mu': (32, 1, 128, 2),
  'Ti': (192, 12, 768, 3),
  'S': (384, 12, 1536, 6),
  'M': (512, 12, 2048, 8),
  'B': (768, 12, 3072, 12),
  'L': (1024, 24, 4096, 16),
  'So400m': (1152, 27, 4304, 16),
  'H': (1280, 32, 5120, 16),
  'g': (1408, 40, 6144, 16),
  'g-opt': (1536, 40, 6144, 16),
  'G': (1664, 48, 8192, 16),
  'G-opt': (1536, 48, 8192, 16),
  'e': (1792, 56, 15360, 16),
}

# The fields that hold a name, and its choices.
CHOICES = {
  'posemb': ('learn', 'sincos2d'),
  'pool_type': ('gap', 'map', 'tok', '0', 'none'),
  'dtype_mm': ('bfloat16', 'float32'),
  'patch_norm': PATCH_NORMS,
  'patch_norm_type': PATCH_NORM_TYPES,
  'sa_norm': common.NORM_PLACEMENTS,
  'mlp_norm': common.NORM_PLACEMENTS,
  'post_norm_at': common.POST_NORMS_AT,
  'sublayer_norm': common.SUBLAYER_NORMS,
  'remat_policy': common.REMAT_POLICIES,
}


class ViT(nn.Module):
  """Vision Transformer.

  Attributes:
    num_classes: outputs of the head; None or 0 for no head.
    patch_size: height and width of a patch in pixels.
    width: size of a token.
    depth: number of blocks.
    mlp_dim: hidden size of the MLPs; None is four times the width.
    num_heads: attention heads.
    posemb: 'learn', or the fixed 'sincos2d'.
    rep_size: size of a tanh layer `pre_logits` before the head; True is the
      width, False for none.
    dropout: rate, on the embedded patches and in the blocks.
    pool_type: what the head sees: 'gap', the mean of all tokens; 'map',
      attention pooling; 'tok', a learned token put in front; '0', the first
      patch; 'none', every token by itself.
    head_zeroinit: start with a head of zeros.
    dtype_mm: dtype of the activations and of the matmuls' operands.
      Parameters, LayerNorm statistics and everything from `encoder_norm` to
      the logits, but for the MAP head, are float32.
    patch_norm: 'dual' for Dual PatchNorm, 'none' or one of its ablations, see
      patch_embed.py.
    patch_norm_type: 'layernorm' or one of its ablations, see patch_embed.py.
    sa_norm, mlp_norm, post_norm_at, sublayer_norm: which LayerNorms a block
      has, see common.Encoder1DBlock.
    stochastic_depth: probability with which a sub-layer of the last block is
      left out in training; it grows linearly from 0 in the first.
    scan: whether the blocks are one loop, compiled once; their parameters then
      are stacked, see common.Encoder.
    remat_policy: what of a block is kept for the backward pass; the rest is
      computed again. A name in jax.checkpoint_policies, or 'none' to keep all;
      None is 'nothing_saveable' with scan, as in big_vision, else 'none'.
  """

  num_classes: int | None = None
  patch_size: tuple[int, int] = (16, 16)
  width: int = 768
  depth: int = 12
  mlp_dim: int | None = None
  num_heads: int = 12
  posemb: str = 'learn'
  rep_size: int | bool = False
  dropout: float = 0.0
  pool_type: str = 'gap'
  head_zeroinit: bool = True
  dtype_mm: str = 'float32'
  patch_norm: str = 'none'
  patch_norm_type: str = 'layernorm'
  sa_norm: str = 'pre'
  mlp_norm: str = 'pre'
  post_norm_at: str = 'output'
  sublayer_norm: str = 'none'
  stochastic_depth: float = 0.0
  scan: bool = False
  remat_policy: str | None = None

  @nn.compact
  def __call__(
    self, image: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Classifies images.

    Args:
      image: (n, height, width, c) floats, in [-1, 1] by convention. A grid of
        h × w patches.
      train: whether dropout and stochastic depth are on; they draw from the
        rng 'dropout'.

    Returns:
      Logits (n, num_classes) float32, or `pre_logits` without a head; and a
      dict of what lies between: `stem` (n, h, w, width), `with_posemb`
      (n, h * w, width), `encoder` (see common.Encoder), `encoded` (the
      sequence), `head_input`, `pre_logits`, `logits` and, with the head
      applied to every patch, `pre_logits_2d`, `logits_2d` (n, h, w, ...).

    Raises:
      ConfigError: an image that is not float or that the patch does not
        divide.
    """
    out = {}
    x = out['stem'] = PatchEmbed(
      width=self.width,
      patch_size=self.patch_size,
      patch_norm=self.patch_norm,
      patch_norm_type=self.patch_norm_type,
      dtype_mm=self.dtype_mm,
      name='embedding',
    )(image)
    n, h, w, _ = x.shape
    x = rearrange(x, 'n h w d -> n (h w) d')
    x = x + self._posemb(h, w)
    if 'posemb' in PATCH_NORMS[self.patch_norm]:
      x = PATCH_NORM_TYPES[self.patch_norm_type](name='posemb_norm')(x)
    x = out['with_posemb'] = x.astype(self.dtype_mm)

    if self.pool_type == 'tok':
      cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
      cls = jnp.tile(cls.astype(x.dtype), (n, 1, 1))
      x = jnp.concatenate([cls, x], axis=1)
    x = constrain(x, *common.STREAM)
    x = nn.Dropout(self.dropout)(x, not train)

    x, out['encoder'] = self._encoder()(x, not train)
    out['encoded'] = x

    x_2d = x[:, 1:] if self.pool_type == 'tok' else x
    x_2d = rearrange(x_2d, 'n (h w) d -> n h w d', h=h)
    x = out['head_input'] = self._pool(x)
    return self._head(x, x_2d, out), out

  def _encoder(self) -> common.Encoder:
    # Sub-LN's own initial values, for as many blocks.
    subln = self.sublayer_norm == 'subln'
    gain = math.sqrt(math.log(2 * self.depth)) if subln else 1.0
    block = functools.partial(
      common.Encoder1DBlock,
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      dropout=self.dropout,
      sa_norm=self.sa_norm,
      mlp_norm=self.mlp_norm,
      post_norm_at=self.post_norm_at,
      sublayer_norm=self.sublayer_norm,
      gain=gain,
      dtype_mm=self.dtype_mm,
    )
    default_policy = 'nothing_saveable' if self.scan else 'none'
    return common.Encoder(
      depth=self.depth,
      block=block,
      stochastic_depth=self.stochastic_depth,
      scan=self.scan,
      remat_policy=self.remat_policy or default_policy,
      name='Transformer',
    )

  def _posemb(self, h: int, w: int) -> jax.Array:
    if self.posemb == 'sincos2d':
      return common.posemb_sincos_2d(h, w, self.width)
    init = nn.initializers.normal(stddev=1 / math.sqrt(self.width))
    return self.param('pos_embedding', init, (1, h * w, self.width))

  def _pool(self, x: jax.Array) -> jax.Array:
    if self.pool_type == 'gap':
      return x.mean(axis=1)
    if self.pool_type == 'map':
      return common.MAPHead(
        mlp_dim=self.mlp_dim,
        num_heads=self.num_heads,
        dtype_mm=self.dtype_mm,
        name='MAPHead_0',
      )(x).astype(jnp.float32)
    return x if self.pool_type == 'none' else x[:, 0]

  def _head(
    self, x: jax.Array, x_2d: jax.Array, out: dict[str, Any]
  ) -> jax.Array:
    # Under jit, what of x_2d nobody reads costs nothing.
    if self.rep_size:
      size = self.width if self.rep_size is True else self.rep_size
      dense = nn.Dense(size, name='pre_logits')
      x, x_2d = nn.tanh(dense(x)), nn.tanh(dense(x_2d))
    out['pre_logits'], out['pre_logits_2d'] = x, x_2d

    if self.num_classes:
      init = (
        nn.initializers.zeros
        if self.head_zeroinit
        else nn.initializers.lecun_normal()
      )
      dense = nn.Dense(self.num_classes, kernel_init=init, name='head')
      x, out['logits_2d'] = dense(x), dense(x_2d)
      out['logits'] = x
    return x


def Model(
  num_classes: int | None = None, *, variant: str | None = None, **kw: Any
) -> ViT:
  """The ViT of a config's `model`.

  Args:
    num_classes: outputs of the head; None or 0 for no head.
    variant: such as 'B/16', see decode_variant.
    **kw: any other field of ViT, over what the variant says. `patch_size` may
      be one number.

  Raises:
    ConfigError: an unknown field, variant or choice, or sizes that do not go
      together.
  """
  config.check_arguments('model vit', ViT, kw, reserved=('parent',))
  fields = {**decode_variant(variant), **kw}
  if 'patch_size' in fields:
    fields['patch_size'] = _pair(fields['patch_size'])
  model = ViT(num_classes, **fields)
  _check(model)
  return model


def decode_variant(variant: str | None) -> dict[str, Any]:
  """The ViT fields that a variant such as 'B' or 'B/16' stands for.

  Args:
    variant: a name of VARIANTS, or a name and the patch's size in pixels, or
      None, which stands for nothing.

  Raises:
    ConfigError: an unknown name, or a size that is not a number.
  """
  if variant is None:
    return {}
  name, slash, patch = variant.partition('/')
  sizes = config.choose('variant', name, VARIANTS)
  fields = dict(
    zip(('width', 'depth', 'mlp_dim', 'num_heads'), sizes, strict=True)
  )
  if not slash:
    return fields
  if not patch.isdecimal():
    raise config.ConfigError(
      f'variant {variant!r}: after the slash comes one number, as in '
      f"'{name}/16'. Patches that are not square are patch_size=(16, 8)."
    )
  return {**fields, 'patch_size': _pair(int(patch))}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
  pair = (size, size) if isinstance(size, int) else tuple(size)
  if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
    raise config.ConfigError(
      f'patch_size is one or two positive numbers of pixels, not {size!r}.'
    )
  return pair


def _check(model: ViT) -> None:
  for field, choices in CHOICES.items():
    value = getattr(model, field)
    if value not in choices and (field, value) != ('remat_policy', None):
      raise config.unknown(field, value, choices)
  norms = (model.sa_norm, model.mlp_norm, model.post_norm_at)
  if model.sublayer_norm != 'none' and norms != ('pre', 'pre', 'output'):
    raise config.ConfigError(
      f'sublayer_norm={model.sublayer_norm!r} has its own LayerNorms beside '
      f'the pre ones: leave out sa_norm, mlp_norm and post_norm_at.'
    )
  for field in ('dropout', 'stochastic_depth'):
    if not 0 <= getattr(model, field) < 1:
      raise config.ConfigError(
        f'{field} is a probability below 1, not {getattr(model, field)}.'
      )
  if model.width % model.num_heads:
    raise config.ConfigError(
      f'width {model.width} is not a multiple of num_heads {model.num_heads}.'
    )
  if model.posemb == 'sincos2d' and (model.width % 4 or model.width < 8):
    raise config.ConfigError(
      f'sincos2d needs a width that is a multiple of 4 and at least 8, not '
      f'{model.width}.'
    )
