"""A Vision Transformer with Dual PatchNorm in torch, for exported weights.

    from dual_patchnorm_vit import DualPatchNormViT

    model = DualPatchNormViT.from_safetensors('model.safetensors').eval()
    logits = model(images)  # (n, channels, height, width) float32

The images are in the range that the training had, mostly [-1, 1]. This file
needs torch alone, 2.4 or later; copy it anywhere. Dual PatchNorm: Kumar,
Dehghani, Houlsby, TMLR 2023, https://arxiv.org/abs/2302.01327.
"""

import json
import math
import struct

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
PATCH_NORMS = {
  'none': (),
  'dual': ('input', 'output'),
  'pre': ('input',),
  'post': ('output',),
  'post_posemb': ('posemb',),
  'pre_post_posemb': ('input', 'posemb'),
}


class Affine(nn.Module):
  """`weight * x + bias`: a LayerNorm that does not standardise."""

  def __init__(self, size: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))
    self.bias = nn.Parameter(torch.zeros(size))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x + self.bias


def make_norm(norm_type: str, size: int) -> nn.Module:
  """The norm of a patch_norm_type over the last dimension."""
  match norm_type:
    case 'layernorm':
      return nn.LayerNorm(size, eps=EPS)
    case 'rmsnorm':
      return nn.RMSNorm(size, eps=EPS)
    case 'only_learnable':
      return Affine(size)
    case 'no_learnable':
      return nn.LayerNorm(size, eps=EPS, elementwise_affine=False)
  raise ValueError(f'unknown patch_norm_type {norm_type!r}')


class PatchEmbed(nn.Module):
  """(n, c, h, w) images to (n, patches, width) embeddings: LN(Dense(LN(x)))."""

  def __init__(
    self,
    patch_size: tuple[int, int],
    channels: int,
    width: int,
    patch_norm: str,
    norm_type: str,
  ):
    super().__init__()
    self.patch_size = patch_size
    self.centred = norm_type in ('layernorm', 'no_learnable')
    pixels = math.prod(patch_size) * channels
    norms = PATCH_NORMS[patch_norm]
    self.ln0 = make_norm(norm_type, pixels) if 'input' in norms else None
    self.dense = nn.Linear(pixels, width)
    self.ln1 = make_norm(norm_type, width) if 'output' in norms else None

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    hp, wp = self.patch_size
    x = images.unfold(2, hp, hp).unfold(3, wp, wp)  # n c h w hp wp
    x = x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if self.ln0 is not None:
      # Relative to one of its own values, a patch of almost one value, such as
      # sky, keeps its digits; a standardisation cannot see the difference.
      x = self.ln0(x - x[..., :1] if self.centred else x)
    x = self.dense(x)
    return x if self.ln1 is None else self.ln1(x)


class Attention(nn.Module):
  """Multi-head attention of `queries` (n, m, d) to `x` (n, l, d)."""

  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads
    self.query, self.key, self.value, self.out = (
      nn.Linear(width, width) for _ in range(4)
    )

  def forward(self, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    heads = (
      y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
      for y in (self.query(queries), self.key(x), self.value(x))
    )
    y = F.scaled_dot_product_attention(*heads)
    return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
  """Linear, gelu (its tanh approximation), Linear."""

  def __init__(self, width: int, mlp_dim: int):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


class Block(nn.Module):
  """A pre-LN Transformer block."""

  def __init__(self, width: int, mlp_dim: int, num_heads: int):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=EPS)
    self.attention = Attention(width, num_heads)
    self.norm2 = nn.LayerNorm(width, eps=EPS)
    self.mlp = Mlp(width, mlp_dim)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.norm1(x)
    x = x + self.attention(y, y)
    return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
  """A learned probe attends to the sequence, (n, l, d) to (n, d)."""

  def __init__(self, width: int, mlp_dim: int, num_heads: int):
    super().__init__()
    self.probe = nn.Parameter(torch.zeros(1, 1, width))
    self.attention = Attention(width, num_heads)
    self.norm = nn.LayerNorm(width, eps=EPS)
    self.mlp = Mlp(width, mlp_dim)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.attention(self.probe.expand(len(x), -1, -1), x)
    return (x + self.mlp(self.norm(x)))[:, 0]


def sincos_2d(h: int, w: int, width: int) -> torch.Tensor:
  """(1, h * w, width) fixed position embeddings, as MoCo v3's."""
  omega = 10_000.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
  rows = torch.arange(h).repeat_interleave(w)[:, None] * omega
  columns = torch.arange(w).repeat(h)[:, None] * omega
  waves = [columns.sin(), columns.cos(), rows.sin(), rows.cos()]
  return torch.cat(waves, dim=1)[None].float()


class DualPatchNormViT(nn.Module):
  """A Vision Transformer.

  Args:
    image_size: height and width in pixels.
    channels: of an image.
    patch_size: height and width in pixels.
    width, depth, mlp_dim, num_heads: of the Transformer.
    num_classes: outputs of the head; 0 for none.
    rep_size: size of a tanh layer before the head; 0 for none.
    posemb: 'learn' or 'sincos2d'.
    pool_type: 'gap', 'map', 'tok', '0' or 'none'.
    patch_norm: 'dual', 'none' or another key of PATCH_NORMS.
    patch_norm_type: 'layernorm', 'rmsnorm', 'only_learnable', 'no_learnable'.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int],
    channels: int,
    patch_size: tuple[int, int],
    width: int,
    depth: int,
    mlp_dim: int,
    num_heads: int,
    num_classes: int,
    rep_size: int,
    posemb: str,
    pool_type: str,
    patch_norm: str,
    patch_norm_type: str,
  ):
    super().__init__()
    self.image_shape = (channels, *image_size)
    self.pool_type = pool_type
    h, w = (i // p for i, p in zip(image_size, patch_size, strict=True))
    self.embedding = PatchEmbed(
      tuple(patch_size), channels, width, patch_norm, patch_norm_type
    )
    if posemb == 'learn':
      self.posemb = nn.Parameter(torch.zeros(1, h * w, width))
    else:
      self.register_buffer('posemb', sincos_2d(h, w, width), persistent=False)
    after = 'posemb' in PATCH_NORMS[patch_norm]
    self.posemb_norm = make_norm(patch_norm_type, width) if after else None
    if pool_type == 'tok':
      self.cls = nn.Parameter(torch.zeros(1, 1, width))
    self.blocks = nn.ModuleList(
      Block(width, mlp_dim, num_heads) for _ in range(depth)
    )
    self.norm = nn.LayerNorm(width, eps=EPS)
    if pool_type == 'map':
      self.pool = AttentionPool(width, mlp_dim, num_heads)
    self.pre_logits = nn.Linear(width, rep_size) if rep_size else None
    self.head = (
      nn.Linear(rep_size or width, num_classes) if num_classes else None
    )

  @classmethod
  def from_safetensors(cls, path: str) -> 'DualPatchNormViT':
    """The model of an exported file, with its weights, float32."""
    tensors, metadata = read_safetensors(path)
    if 'model' not in metadata:
      raise ValueError(
        f'{path} does not describe its model: expected a file that tools.export'
        ' of big_vision_dpn wrote'
      )
    model = cls(**json.loads(metadata['model']))
    model.load_state_dict(tensors)
    return model

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Logits of (n, c, h, w) float32 images; what the head sees without one."""
    if images.shape[1:] != self.image_shape:
      raise ValueError(
        f'images are {tuple(images.shape[1:])}; expected (channels, height,'
        f' width) {self.image_shape}: resize or transpose them'
      )
    x = self.embedding(images) + self.posemb
    if self.posemb_norm is not None:
      x = self.posemb_norm(x)
    if self.pool_type == 'tok':
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
    for block in self.blocks:
      x = block(x)
    x = self._pool(self.norm(x))
    if self.pre_logits is not None:
      x = torch.tanh(self.pre_logits(x))
    return x if self.head is None else self.head(x)

  def _pool(self, x: torch.Tensor) -> torch.Tensor:
    if self.pool_type == 'gap':
      return x.mean(dim=1)
    if self.pool_type == 'map':
      return self.pool(x)
    return x if self.pool_type == 'none' else x[:, 0]


def read_safetensors(
  path: str,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
  """Tensors, float32, and metadata of a safetensors file."""
  with open(path, 'rb') as file:
    (size,) = struct.unpack('<Q', file.read(8))
    header, data = json.loads(file.read(size)), bytearray(file.read())
  metadata, tensors = header.pop('__metadata__', {}), {}
  for name, entry in header.items():
    if entry['dtype'] != 'F32':
      raise ValueError(f'{path}: {name} is {entry["dtype"]}; expected F32')
    start, end = entry['data_offsets']
    count = (end - start) // 4
    flat = torch.frombuffer(
      data, dtype=torch.float32, count=count, offset=start
    )
    tensors[name] = flat.reshape(entry['shape']).clone()
  return tensors, metadata
