"""Runs exported weights in torch, in a process of its own.

    python torch_worker.py WHAT FOLDER

WHAT is a function below. It reads FOLDER/images.npy and what was exported to
FOLDER/export, and writes FOLDER/output.npy. TensorFlow and torchvision, which
timm needs, cannot be loaded by the same process.
"""

import functools
import os
import sys

import numpy as np
import torch


def one_file(folder, images):
  # The copy beside the weights, not the one of this repository.
  sys.path.insert(0, f'{folder}/export')
  from dual_patchnorm_vit import DualPatchNormViT

  path = f'{folder}/export/model.safetensors'
  return DualPatchNormViT.from_safetensors(path).eval()(images)


def timm_npz(folder, images):
  import timm

  model = timm.models.VisionTransformer(
    img_size=(12, 18),
    patch_size=(4, 6),
    num_classes=10,
    embed_dim=24,
    depth=2,
    num_heads=3,
    mlp_ratio=40 / 24,
    no_embed_class=True,
    act_layer=functools.partial(torch.nn.GELU, approximate='tanh'),
  )
  model.load_pretrained(f'{folder}/export/model.npz')
  return model.eval()(images)


def _fill(folder, **modules):
  """Puts DPN's parameters into LayerNorms and a Linear."""
  arrays = np.load(f'{folder}/export/model.npz')
  for name, module in modules.items():
    weight = 'kernel' if name == 'dense' else 'scale'
    weight = arrays[f'params/embedding/{name}/{weight}'].T
    module.weight.data = torch.from_numpy(weight)
    module.bias.data = torch.from_numpy(arrays[f'params/embedding/{name}/bias'])
    module.eps = 1e-6


def vit_pytorch_stem(folder, images):
  import vit_pytorch

  stem = vit_pytorch.ViT(
    image_size=(12, 18),
    patch_size=(4, 6),
    num_classes=1,
    dim=24,
    depth=1,
    heads=1,
    mlp_dim=1,
  ).to_patch_embedding
  _, ln0, dense, ln1 = stem
  _fill(folder, ln0=ln0, dense=dense, ln1=ln1)
  return stem(images)


def timm_naflex_stem(folder, images):
  from timm.models.naflexvit import NaFlexEmbeds

  stem = NaFlexEmbeds(
    patch_size=(4, 6),
    embed_dim=24,
    proj_type='linear',
    class_token=False,
    pos_embed='none',
    input_norm_layer=torch.nn.LayerNorm,
    proj_norm_layer=torch.nn.LayerNorm,
  )
  _fill(folder, ln0=stem.norm_input, dense=stem.proj, ln1=stem.norm)
  return stem(images)[0]


if __name__ == '__main__':
  _, what, folder = sys.argv
  images = torch.from_numpy(np.load(os.path.join(folder, 'images.npy')))
  with torch.no_grad():
    output = globals()[what](folder, images.permute(0, 3, 1, 2))
  np.save(os.path.join(folder, 'output.npy'), output.numpy())
