r"""ViT on a folder of your own images, with Dual PatchNorm or without.

    bash tools/run.sh big_vision_dpn.train --workdir workdirs/flowers \
      --config configs/proj/dpn/image_folder.py:data_dir=/data/flowers,epochs=30

The folder has data_dir/train/CLASS/**/NAME.jpg and data_dir/val/CLASS/…, also
.png, .gif and .bmp; the classes are the names of its folders.

Arguments: data_dir, variant (as in vit_i1k.py), patch_norm (dual, none),
epochs, batch_size, seed, runlocal. `runlocal` is 10 steps of 8, on the folder
or, without one, on the embedded MNIST digits.

Augmentation and optimizer are AugReg's (Steiner et al., arXiv 2106.10270), the
learning rate is scaled with the batch. An image that cannot be read is
reported and left out.
"""

import ml_collections

import big_vision_dpn.config as bvcc
from big_vision_dpn.datasets import image_folder


def get_config(arg=None):
  """The config of one run; the arguments are described above."""
  arg = bvcc.parse_arg(
    arg,
    data_dir='',
    variant='S/16',
    patch_norm='dual',
    epochs=100,
    batch_size=256,
    seed=0,
    runlocal=False,
  )
  c = ml_collections.ConfigDict()

  if arg.data_dir:
    data = dict(name='bv:image_folder', data_dir=arg.data_dir)
    c.num_classes = len(image_folder.classes(arg.data_dir))
    train, val = dict(data, split='train'), dict(data, split='val')
  elif arg.runlocal:
    c.num_classes = 10
    train = dict(name='bv:mnist5k', split='train')
    val = dict(name='bv:mnist5k', split='test[:16]')
  else:
    raise bvcc.ConfigError('data_dir is missing: image_folder.py:data_dir=…')

  c.seed = arg.seed
  c.total_epochs = arg.epochs
  c.loss = 'softmax_xent'

  finish = (
    f'|value_range(-1, 1)|onehot({c.num_classes}, key="label",'
    ' key_result="labels")|keep("image", "labels")'
  )
  c.input = dict(
    data=train,
    batch_size=arg.batch_size,
    skip_errors=True,
    pp='decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2, 10)' + finish,
  )
  c.mixup = dict(p=0.2)

  c.model_name = 'vit'
  c.model = dict(
    variant=arg.variant, patch_norm=arg.patch_norm, pool_type='gap'
  )

  c.optax_name = 'scale_by_adam'
  c.optax = dict(mu_dtype='bfloat16')
  c.grad_clip_norm = 1.0
  c.lr = 1e-3 * min(1.0, arg.batch_size / 1024)
  c.wd = 1e-4
  c.schedule = dict(decay_type='cosine', warmup_percent=0.1)

  c.log_training_steps = 50
  c.ckpt_steps = 1000
  c.evals = dict(
    val=dict(
      type='classification',
      data=val,
      pp_fn='decode|resize_small(256)|central_crop(224)' + finish,
      loss_name=c.loss,
      skip_errors=True,
      log_epochs=1,
    )
  )

  if arg.runlocal:
    del c.total_epochs
    c.total_steps = 10
    c.log_training_steps = 2
    c.input.batch_size = 8
    del c.evals.val.log_epochs
    c.evals.val.log_steps = 10
  return c
