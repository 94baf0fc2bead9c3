"""HuggingFace's and timm's ViTs: their names and layouts to ours.

HuggingFace: `ViTModel` and `ViTForImageClassification`. timm: `vit_*`, with
its `head`, `pre_logits` and attention pooling. A parameter that neither our
ViT nor these tables know keeps its name, and so does not fit the model.

The loaded model is the same function but for this: HuggingFace's gelu, and
timm's but for models that say otherwise, is the exact one, ours the tanh
approximation (the two differ by 5e-4 at most); the LayerNorms' ε is 1e-12 in
HuggingFace's and 1e-6 in timm's and ours. What HuggingFace calls pooler is our
`rep_size=True` with `pool_type='tok'`.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange

from big_vision_dpn.config import ConfigError

_BLOCK = r'Transformer/encoderblock_\1'
_ATTENTION = f'{_BLOCK}/MultiHeadDotProductAttention_0'
_MLP = f'{_BLOCK}/MlpBlock_0'
_POOL = 'MAPHead_0/MultiHeadDotProductAttention_0'

# (Regex, ours), for whole names without `weight` or `bias`.
_HUGGINGFACE = (
  (r'embeddings\.cls_token', 'cls'),
  (r'embeddings\.position_embeddings', 'pos_embedding'),
  (r'embeddings\.patch_embeddings\.projection', 'embedding'),
  (
    r'encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)',
    rf'{_ATTENTION}/\2',
  ),
  (r'encoder\.layer\.(\d+)\.attention\.output\.dense', f'{_ATTENTION}/out'),
  (r'encoder\.layer\.(\d+)\.layernorm_before', f'{_BLOCK}/LayerNorm_0'),
  (r'encoder\.layer\.(\d+)\.layernorm_after', f'{_BLOCK}/LayerNorm_1'),
  (r'encoder\.layer\.(\d+)\.intermediate\.dense', f'{_MLP}/Dense_0'),
  (r'encoder\.layer\.(\d+)\.output\.dense', f'{_MLP}/Dense_1'),
  (r'layernorm', 'Transformer/encoder_norm'),
  (r'pooler\.dense', 'pre_logits'),
  (r'classifier', 'head'),
)
_TIMM = (
  (r'cls_token', 'cls'),
  (r'pos_embed', 'pos_embedding'),
  (r'patch_embed\.proj', 'embedding'),
  (r'blocks\.(\d+)\.attn\.(query|key|value)', rf'{_ATTENTION}/\2'),
  (r'blocks\.(\d+)\.attn\.proj', f'{_ATTENTION}/out'),
  (r'blocks\.(\d+)\.norm1', f'{_BLOCK}/LayerNorm_0'),
  (r'blocks\.(\d+)\.norm2', f'{_BLOCK}/LayerNorm_1'),
  (r'blocks\.(\d+)\.mlp\.fc1', f'{_MLP}/Dense_0'),
  (r'blocks\.(\d+)\.mlp\.fc2', f'{_MLP}/Dense_1'),
  (r'norm', 'Transformer/encoder_norm'),
  (r'attn_pool\.latent', 'MAPHead_0/probe'),
  (r'attn_pool\.(query|key|value)', rf'{_POOL}/\1'),
  (r'attn_pool\.proj', f'{_POOL}/out'),
  (r'attn_pool\.norm', 'MAPHead_0/LayerNorm_0'),
  (r'attn_pool\.mlp\.fc1', 'MAPHead_0/MlpBlock_0/Dense_0'),
  (r'attn_pool\.mlp\.fc2', 'MAPHead_0/MlpBlock_0/Dense_1'),
  (r'pre_logits\.fc', 'pre_logits'),
  (r'head', 'head'),
)
# What timm keeps in one matrix, one below the other.
_FUSED = {
  'qkv': ('query', 'key', 'value'),
  'kv': ('key', 'value'),
  'q': ('query',),
}


def is_foreign(arrays: Mapping[str, np.ndarray]) -> bool:
  """Whether the names are torch's, with dots."""
  return any('.' in name for name in arrays)


def convert(
  arrays: Mapping[str, np.ndarray], num_heads: int, source: str
) -> dict[str, np.ndarray]:
  """Arrays in our names and layouts.

  Args:
    arrays: by HuggingFace's or timm's names, and in their layouts.
    num_heads: of the model; the file does not say.
    source: what messages call the file.

  Raises:
    ConfigError: the names are neither's.
  """
  arrays = {name.removeprefix('vit.'): a for name, a in arrays.items()}
  if 'embeddings.patch_embeddings.projection.weight' in arrays:
    table = _HUGGINGFACE
  elif 'patch_embed.proj.weight' in arrays:
    table, arrays = _TIMM, _split_fused(arrays)
  else:
    raise ConfigError(
      f'{source}: names such as {min(arrays)!r} are neither those of big_vision'
      " nor of HuggingFace's ViTModel nor of timm's vit_*. Another model's part"
      ' is named behind a colon, as in FILE:vision_model.'
    )
  converted = {}
  for name, array in arrays.items():
    module, _, leaf = name.rpartition('.')
    if leaf not in ('weight', 'bias'):
      converted[_rename(name, table) or name] = array
    elif ours := _rename(module, table):
      leaf, array = _to_flax(ours, leaf, array, num_heads)
      converted[f'{ours}/{leaf}'] = array
    else:
      converted[name] = array
  return converted


def _split_fused(
  arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  split = {}
  for name, array in arrays.items():
    match = re.fullmatch(r'(.+\.)(qkv|kv|q)(\.(?:weight|bias))', name)
    names = _FUSED[match[2]] if match else ()
    if not names or len(array) % len(names):
      split[name] = array
      continue
    parts = np.split(array, len(names))
    for part_name, part in zip(names, parts, strict=True):
      split[f'{match[1]}{part_name}{match[3]}'] = part
  return split


def _rename(name: str, table: Sequence[tuple[str, str]]) -> str | None:
  for regex, ours in table:
    if match := re.fullmatch(regex, name):
      return match.expand(ours)
  return None


def _to_flax(
  module: str, leaf: str, array: np.ndarray, num_heads: int
) -> tuple[str, np.ndarray]:
  """flax's name and layout of the `weight` or `bias` of one of our modules."""
  if leaf == 'weight':
    leaf = 'scale' if array.ndim == 1 else 'kernel'
    if array.ndim == 4:
      array = rearrange(array, 'o i h w -> h w i o')
    else:
      array = array.T
  # A number of heads that does not divide is left to be a mismatch.
  if (
    re.search('/(query|key|value)$', module) and not array.shape[-1] % num_heads
  ):
    array = rearrange(array, '... (h d) -> ... h d', h=num_heads)
  if module.endswith('/out') and array.ndim == 2 and not len(array) % num_heads:
    array = rearrange(array, '(h d) o -> h d o', h=num_heads)
  return leaf, array
