r"""A small ViT on CIFAR-10, with Dual PatchNorm or without.

    bash tools/run.sh big_vision_dpn.train \
      --config configs/proj/dpn/cifar10.py:patch_norm=dual,epochs=10 \
      --workdir workdirs/cifar10_dpn

Arguments: patch_norm (dual, none), seed, epochs, runlocal. `runlocal` is 30
steps of a model of two blocks on 2,000 images. The recipe has the ingredients
of AugReg (Steiner et al., arXiv 2106.10270), randaug, mixup, weight decay and
the sigmoid loss, at a strength for 32 pixels.

Measured, on two cores of an Intel Xeon, one seed each, accuracy on
the test split after three epochs with patches of 8×8:

    DPN 0.373, baseline 0.359
    cifar10.py:patch_norm=…,epochs=3 --config.model.patch_size=8

The data, once:

    bash tools/run.sh tools.prepare_data cifar10
"""

import ml_collections

import big_vision_dpn.config as bvcc


def get_config(arg=None):
  """The config of one run; the arguments are described above."""
  arg = bvcc.parse_arg(
    arg, patch_norm='dual', seed=0, epochs=100, runlocal=False
  )
  c = ml_collections.ConfigDict()

  c.seed = arg.seed
  c.total_epochs = arg.epochs
  c.num_classes = 10
  c.loss = 'sigmoid_xent'
  c.init_head_bias = -2.3  # Each class begins at a probability of 1/10.

  pp_common = (
    '|value_range(-1, 1)'
    '|onehot(10, key="label", key_result="labels")|keep("image", "labels")'
  )
  c.input = dict(
    data=dict(name='cifar10', split='train'),
    batch_size=256,
    pp=(
      'decode|inception_crop(32, area_min=40)|flip_lr|randaug(1, 2)' + pp_common
    ),
  )
  c.mixup = dict(p=0.2)

  c.model_name = 'vit'
  c.model = dict(
    patch_size=4,
    width=192,
    depth=6,
    mlp_dim=768,
    num_heads=3,
    pool_type='gap',
    patch_norm=arg.patch_norm,
  )

  c.optax_name = 'scale_by_adam'
  c.grad_clip_norm = 1.0
  c.lr = 1e-3
  c.wd = 1e-4
  c.schedule = dict(decay_type='cosine', warmup_percent=0.1)

  c.log_training_steps = 50
  c.ckpt_steps = 500
  c.evals = dict(
    test=dict(
      type='classification',
      data=dict(name='cifar10', split='test'),
      pp_fn='decode|resize(32)' + pp_common,
      loss_name=c.loss,
      log_epochs=1,
    )
  )

  if arg.runlocal:
    del c.total_epochs
    c.total_steps = 30
    c.log_training_steps = 5
    c.input.batch_size = 32
    c.model.depth = 2
    c.input.data.split = 'train[:2000]'
    c.evals.test.data.split = 'test[:500]'
  return c
