r"""ViT on ImageNet-1k with the AugReg recipe, with Dual PatchNorm or without.

    bash tools/run.sh big_vision_dpn.train \
      --config configs/proj/dpn/vit_i1k.py:variant=S/16,patch_norm=dual \
      --workdir workdirs/i1k_s16_dpn

Arguments: variant (Ti/16, S/16, S/32, B/16, B/32, L/16), patch_norm (dual,
none), seed, runlocal. `runlocal` runs the same recipe for 10 steps of 8 on
the embedded MNIST digits in place of ImageNet.

Hardware: the batch of 4096 is meant for 32 TPU cores or eight large GPUs. Not
trained to the end by us, so there is no result here; `--dry_run` tells
parameters, FLOPs, steps and the learning rate's course, and needs no data.

Sources: Kumar et al., "Dual PatchNorm", arXiv 2302.01327; Steiner et al., "How
to train your ViT?", arXiv 2106.10270. 1% of the training split is held out,
as `minival`.
"""

import ml_collections

import big_vision_dpn.config as bvcc

# AugReg's presets: layers and magnitude of randaug, p of mixup.
AUGMENTATION = {
  'light1': (2, 0, 0.0),
  'medium1': (2, 15, 0.2),
  'medium2': (2, 15, 0.5),
}
PRESETS = {
  'Ti/16': 'light1',
  'S/32': 'medium1',
  'S/16': 'medium2',
  'B/32': 'medium2',
  'B/16': 'medium2',
  'L/16': 'medium2',
}


def get_config(arg=None):
  """The config of one model; the arguments are described above."""
  arg = bvcc.parse_arg(
    arg, variant='B/16', patch_norm='dual', seed=0, runlocal=False
  )
  preset = bvcc.choose('variant', arg.variant, PRESETS)
  layers, magnitude, mixup_p = AUGMENTATION[preset]
  c = ml_collections.ConfigDict()

  c.seed = arg.seed
  c.total_epochs = 300
  c.num_classes = 1000
  c.loss = 'sigmoid_xent'
  c.init_head_bias = -6.9  # Each class begins at a probability of 1/1000.

  labels = '|onehot(1000, key="label", key_result="labels")'
  keep = '|keep("image", "labels")'
  c.input = dict(
    data=dict(name='imagenet2012', split='train[:99%]'),
    batch_size=4096,
    shuffle_buffer_size=50_000,
    pp=(
      'decode_jpeg_and_inception_crop(224)|flip_lr'
      f'|randaug({layers}, {magnitude})|value_range(-1, 1)' + labels + keep
    ),
  )
  c.mixup = dict(p=mixup_p)

  c.model_name = 'vit'
  c.model = dict(
    variant=arg.variant,
    patch_norm=arg.patch_norm,
    rep_size=True,
    pool_type='tok',
  )

  c.optax_name = 'scale_by_adam'
  c.optax = dict(mu_dtype='bfloat16')
  c.grad_clip_norm = 1.0
  c.lr = 1e-3
  c.wd = 1e-4
  c.schedule = dict(decay_type='cosine', warmup_steps=10_000)

  c.log_training_steps = 50
  c.ckpt_steps = 1000

  pp_eval = (
    'decode|resize_small(256)|central_crop(224)|value_range(-1, 1)'
    + labels
    + keep
  )

  def accuracy(split):
    return dict(
      type='classification',
      data=dict(name='imagenet2012', split=split),
      pp_fn=pp_eval,
      loss_name=c.loss,
      log_steps=2500,
    )

  c.evals = dict(minival=accuracy('train[99%:]'), val=accuracy('validation'))

  if arg.runlocal:
    _run_locally(c)
  return c


def _run_locally(c):
  """Makes of the recipe a run of seconds, on data that is always there."""
  del c.total_epochs
  c.total_steps = 10
  c.schedule.warmup_steps = 2
  c.log_training_steps = 2
  c.input.batch_size = 8
  c.input.data = dict(name='bv:mnist5k', split='train')
  c.evals = dict(val=c.evals.val)
  c.evals.val.data = dict(name='bv:mnist5k', split='test[:16]')
