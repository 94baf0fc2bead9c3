"""Images to patch embeddings, plain or with Dual PatchNorm (DPN).

DPN is `LN(PE(LN(x)))`: a LayerNorm before and one after the projection of a
ViT's patches, everything else unchanged (Kumar, Dehghani, Houlsby, "Dual
PatchNorm", TMLR 2023, https://arxiv.org/abs/2302.01327).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from big_vision_dpn import config

PATCH_NORMS = ('none', 'dual')


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


class PatchEmbed(nn.Module):
  """The linear embedding of image patches, the stem of a ViT.

  With `patch_norm='none'` the function and the parameters are those of a
  convolution whose stride is its kernel, `kernel` (hp, wp, c, width) and
  `bias` (width). With 'dual' it is DPN, in the submodules `ln0` (over all
  pixels and channels of a patch), `dense` and `ln1` (over the width).

  Attributes:
    width: size of an embedding.
    patch_size: height and width of a patch in pixels.
    patch_norm: one of PATCH_NORMS.
    dtype_mm: dtype of the matmul's operands and of the result. Parameters,
      both LayerNorms' arithmetic and the matmul's sums are float32.
  """

  width: int
  patch_size: tuple[int, int]
  patch_norm: str = 'none'
  dtype_mm: str = 'float32'

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Embeds (n, h, w, c) float images as (n, h / hp, w / wp, width).

    Raises:
      ConfigError: an integer image, an image that the patch does not divide,
        or an unknown patch_norm.
    """
    if not jnp.issubdtype(image.dtype, jnp.floating):
      raise config.ConfigError(
        f'the model takes float images, not {image.dtype}: end the '
        f'preprocessing with value_range(-1, 1), say.'
      )
    patches = cut_patches(image, self.patch_size)
    if self.patch_norm == 'none':
      return self._project(patches)
    if self.patch_norm == 'dual':
      return self._dual(patches)
    raise config.unknown('patch_norm', self.patch_norm, PATCH_NORMS)

  def _project(self, patches: jax.Array) -> jax.Array:
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

  def _dual(self, patches: jax.Array) -> jax.Array:
    # Sky and padding make patches of almost one value, whose deviations need
    # every digit: so float32, a variance in two passes, and the patch taken
    # relative to one of its own values, which LayerNorm cannot see but which
    # makes the rounding of its mean as small as the deviations.
    x = patches.astype(jnp.float32)
    x = x - jax.lax.stop_gradient(x[..., :1])
    x = nn.LayerNorm(use_fast_variance=False, dtype=self.dtype_mm, name='ln0')(
      x
    )
    x = nn.Dense(self.width, dtype=self.dtype_mm, name='dense')(x)
    return nn.LayerNorm(dtype=self.dtype_mm, name='ln1')(x)
