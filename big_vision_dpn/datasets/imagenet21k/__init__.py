"""ImageNet-21k for TFDS: importing this registers `imagenet21k`."""

from big_vision_dpn.datasets.imagenet21k.builder import (
  Imagenet21k,
  Release,
  wnids,
)

__all__ = ['Imagenet21k', 'Release', 'wnids']
