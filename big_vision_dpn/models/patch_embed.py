"""Images to patch embeddings: plain, with Dual PatchNorm (DPN), or ablated.

DPN is `LN(PE(LN(x)))`: a LayerNorm before and one after the projection of a
ViT's patches, everything else unchanged (Kumar, Dehghani, Houlsby, "Dual
PatchNorm", TMLR 2023, https://arxiv.org/abs/2302.01327). With PE(x) = xW + b on
patches x and position embeddings E, `patch_norm` is

    none             PE(x) + E
    dual             LN1(PE(LN0(x))) + E
    pre              PE(LN0(x)) + E
    post             LN1(PE(x)) + E
    post_posemb      LN(PE(x) + E)
    pre_post_posemb  LN(PE(LN0(x)) + E)

and `patch_norm_type` says what LN is, with μ, σ² the mean and variance of x,
γ and β parameters that begin at 1 and 0, and ε = 1e-6:

    layernorm        γ (x − μ) / √(σ² + ε) + β
    rmsnorm          γ x / √(mean(x²) + ε)
    only_learnable   γ x + β
    no_learnable     (x − μ) / √(σ² + ε)

In bfloat16 the norms' parameters and arithmetic stay float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from big_vision_dpn import config

# Where the norms stand: on the patches, on their embeddings, and on the sum of
# embeddings and position embeddings.
PATCH_NORMS = {
  'none': (),
  'dual': ('input', 'output'),
  'pre': ('input',),
  'post': ('output',),
  'post_posemb': ('posemb',),
  'pre_post_posemb': ('input', 'posemb'),
}


def cut_patches(image: jax.Array, patch_size: tuple[int, int]) -> jax.Array:
  """Cuts images into patches that do not overlap.

  Args:
    image: (n, h, w, c).
    patch_size: height and width of a patch in pixels.

  Returns:
    (n, h / hp, w / wp, hp * wp * c), in a patch the channel fastest, of the
    image's dtype.

  Raises:
    ConfigError: the patch does not divide the image.
  """
  (hp, wp), (h, w) = patch_size, image.shape[1:3]
  if h % hp or w % wp:
    raise config.ConfigError(
      f'patches of {hp}×{wp} do not divide an image of {h}×{w}: change '
      f'patch_size or the size that the preprocessing gives.'
    )
  return rearrange(
    image, 'n (ht hp) (wt wp) c -> n ht wt (hp wp c)', hp=hp, wp=wp
  )


class Affine(nn.Module):
  """`scale * x + bias`, a LayerNorm that does not standardise.

  Attributes:
    dtype: of the result; the arithmetic is float32.
  """

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., d) to (..., d)."""
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return (scale * x.astype(jnp.float32) + bias).astype(self.dtype)


# A standardisation in two passes over x: the usual one, E[x²] − E[x]², loses
# the digits of patches that are almost constant.
_LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
# What makes the module of a norm, over the last dimension, in float32.
PATCH_NORM_TYPES = {
  'layernorm': _LayerNorm,
  'rmsnorm': nn.RMSNorm,
  'only_learnable': Affine,
  'no_learnable': functools.partial(
    _LayerNorm, use_scale=False, use_bias=False
  ),
}


class PatchEmbed(nn.Module):
  """The linear embedding of image patches, the stem of a ViT.

  With `patch_norm='none'` the function and the parameters are those of a
  convolution whose stride is its kernel, `kernel` (hp, wp, c, width) and
  `bias` (width). All others have the submodule `dense`, `kernel` (hp * wp * c,
  width) and `bias`; before it `ln0`, over all pixels and channels of a patch,
  and after it `ln1`, over the width, where they have these norms. One after the
  position embeddings is the caller's.

  Attributes:
    width: size of an embedding.
    patch_size: height and width of a patch in pixels.
    patch_norm: a key of PATCH_NORMS.
    patch_norm_type: a key of PATCH_NORM_TYPES.
    dtype_mm: dtype of the matmul's operands and of the result. Parameters, the
      norms' arithmetic and the matmul's sums are float32.
  """

  width: int
  patch_size: tuple[int, int]
  patch_norm: str = 'none'
  patch_norm_type: str = 'layernorm'
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Embeds (n, h, w, c) float images as (n, h / hp, w / wp, width).

    Raises:
      ConfigError: an integer image, an image that the patch does not divide,
        or an unknown patch_norm or patch_norm_type.
    """
    if not jnp.issubdtype(image.dtype, jnp.floating):
      raise config.ConfigError(
        f'the model takes float images, not {image.dtype}: end the '
        f'preprocessing with value_range(-1, 1), say.'
      )
    norms = config.choose('patch_norm', self.patch_norm, PATCH_NORMS)
    make_norm = functools.partial(
      config.choose('patch_norm_type', self.patch_norm_type, PATCH_NORM_TYPES),
      dtype=self.dtype_mm,
    )
    x = cut_patches(image, self.patch_size)
    if self.patch_norm == 'none':
      return self._convolve(x)
    if 'input' in norms:
      x = make_norm(name='ln0')(self._prepare(x))
    x = nn.Dense(self.width, dtype=self.dtype_mm, name='dense')(x)
    if 'output' in norms:
      x = make_norm(name='ln1')(x)
    return x

  def _convolve(self, patches: jax.Array) -> jax.Array:
    # A matmul, as XLA's convolution takes longer on a CPU.
    channels = patches.shape[-1] // (self.patch_size[0] * self.patch_size[1])
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (*self.patch_size, channels, self.width),
    )
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    patches, kernel, bias = nn.dtypes.promote_dtype(
      patches, kernel, bias, dtype=self.dtype_mm
    )
    # No preferred_element_type: sums are float32 on every platform as it is,
    # and asking for a float32 result makes both gradients' matmuls float32.
    return patches @ rearrange(kernel, 'hp wp c d -> (hp wp c) d') + bias

  def _prepare(self, patches: jax.Array) -> jax.Array:
    # Sky and padding make patches of almost one value, whose deviations need
    # every digit: so float32, and the patch taken relative to one of its own
    # values, which a standardisation cannot see but which makes the rounding
    # of its mean as small as the deviations.
    x = patches.astype(jnp.float32)
    if self.patch_norm_type in ('layernorm', 'no_learnable'):
      x = x - jax.lax.stop_gradient(x[..., :1])
    return x
