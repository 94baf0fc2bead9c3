"""What the host does for an image, in CPU time.

    bash tools/run.sh tools.benchmark input
    bash tools/run.sh tools.benchmark input --config configs/proj/dpn/vit_i1k.py
    bash tools/run.sh tools.benchmark input --pp "decode|resize(224)|flip_lr"
    bash tools/run.sh tools.benchmark input --against ~/big_vision

It runs the ops of a pp string in tf.data, first one, then two, and so on to the
whole string; the differences are the costs of the ops. An op may make one
before it cheaper: of a resize, only what the crop after it takes is computed.
Without --pp or --config it measures ImageNet's usual training and test lines.
Without --config the images are synthetic JPEGs of 500 x 375 pixels and about 80
kB, which take as long to decode as ImageNet's.

Columns, each the median of several rounds, in which all lines take turns:

  CPU ms     of the process for an image, with tf.data in one thread
  + op       by how much the op changed that
  images/s   of one core, so 1000 / CPU ms
  Python ms  CPU time within Python for an image, on images of a few pixels,
             where next to nothing is computed: at most so long the lock of the
             interpreter is held, during which no other thread has it
  big_vision, ratio   CPU ms of the same ops in the checkout named by --against,
             and how many times ours that is
"""

import argparse
import ast
import importlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw

from big_vision_dpn import config as config_lib
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core
from big_vision_dpn.pp import builder
from tools.benchmark import load_config

LINES = (
  'decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2, 10)'
  '|value_range(-1, 1)',
  'decode|resize_small(256)|central_crop(224)|value_range(-1, 1)',
)
# Ops whose first argument is the size of the image that they make.
_SIZED = (
  *('resize', 'resize_small', 'resize_long', 'random_crop', 'central_crop'),
  *('inception_crop', 'decode_jpeg_and_inception_crop'),
)
Features = dict[str, Any]
Preprocess = Callable[[Features, tf.Tensor], Features]


def synthetic_jpegs(n: int, height: int = 375, width: int = 500) -> list[bytes]:
  """JPEGs with the statistics of photographs, all different.

  Noise whose amplitude falls with the frequency, as that of natural images
  does, and a few shapes with sharp edges.
  """
  rng = np.random.default_rng(0)
  y = np.fft.fftfreq(height)[:, None]
  x = np.fft.rfftfreq(width)
  amplitude = 1 / np.maximum(np.hypot(y, x), 1 / width) ** 1.1
  noise = rng.normal(size=(n, 4, *amplitude.shape, 2)) @ [1, 1j]
  files = []
  for spectrum in noise * amplitude:
    waves = np.fft.irfft2(spectrum, (height, width))
    waves /= waves.std((1, 2), keepdims=True)
    # Channels have most in common.
    pixels = 118 + 45 * waves[0] + 18 * waves[1:]
    pixels = np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    files.append(_encode(pixels, rng))
  return files


def _encode(pixels: np.ndarray, rng: np.random.Generator) -> bytes:
  image = Image.fromarray(pixels)
  draw = ImageDraw.Draw(image)
  for shape in (draw.rectangle, draw.ellipse, draw.line) * 2:
    corners = rng.uniform(size=(2, 2)) * 0.3 + rng.uniform(0, 0.7, 2)
    corners *= image.size
    box = [*corners.min(0), *corners.max(0)]
    shape(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
  # The quality at which photographs of this size have about 80 kB.
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=85)
  return file.getvalue()


def _synthetic(n: int) -> tuple[tf.data.Dataset, str]:
  files = synthetic_jpegs(n)
  kb = sum(map(len, files)) / n / 1000
  data = tf.data.Dataset.from_tensor_slices({'image': files, 'label': [0] * n})
  return data, f'{n} synthetic JPEGs of 500 x 375 and {kb:.0f} kB'


def _examples(config: Any, n: int) -> tuple[tf.data.Dataset, str]:
  """The first raw examples of a config's training data."""
  data = config.input.data
  if 'name' not in data:
    raise ConfigError(
      'config.input.data is a mix; give one of its pp strings by --pp'
    )
  source = core.get(**data)
  if source.missing:
    raise ConfigError(source.missing)
  if source.lookup is not None:
    records = tf.data.Dataset.range(source.num_examples).map(source.lookup)
  else:
    # One after another, as the first file may hold fewer.
    paths = [shard.path for shard in source.shards]
    records = tf.data.TFRecordDataset(paths)
  return records.take(n).map(source.parse), f'{n} examples of {source.name}'


def _prepare(
  data: tf.data.Dataset, preprocess: Preprocess, n: int, threads: int = 1
) -> Iterator[Features]:
  """An endless iterator, of which each step preprocesses n cached examples.

  It gives every n-th: as in training, they do not come to Python one by one.
  """
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  # Nothing shall run while another line is measured.
  options.experimental_optimization.inject_prefetch = False

  def finish(i: tf.Tensor, features: Features) -> Features:
    return preprocess(features, tf.stack([i, 7]))

  data = data.cache().repeat().enumerate()
  data = data.map(finish, num_parallel_calls=threads).shard(n, 0)
  return iter(data.with_options(options))


class Line:
  """A prefix of a pp string that is measured."""

  def __init__(self, data: tf.data.Dataset, preprocess: Preprocess, n: int):
    self._iterator, self._n = _prepare(data, preprocess, n), n
    self._times: list[float] = []
    for _ in range(2):  # The raw data is in memory then.
      next(self._iterator)

  def measure(self) -> None:
    """One round."""
    start = time.process_time()
    next(self._iterator)
    self._times.append((time.process_time() - start) / self._n * 1e3)

  @property
  def ms(self) -> float:
    """CPU time for an image."""
    return float(np.median(self._times))


def python_ms(data: tf.data.Dataset, pp: str, n: int = 200) -> float:
  """CPU milliseconds in Python for an image, on images of a few pixels."""
  spent = 0.0
  numpy_function = tf.numpy_function
  file = io.BytesIO()
  Image.new('RGB', (16, 12)).save(file, 'JPEG')

  def timed(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    def call(*values: Any) -> Any:
      nonlocal spent
      start = time.thread_time()
      out = fn(*values)
      spent += time.thread_time() - start
      return out

    return numpy_function(call, *args, **kwargs)

  def shrink(features: Features) -> Features:
    encoded = features['image'].dtype == tf.string
    return {**features, 'image': file.getvalue()} if encoded else features

  if 'image' in data.element_spec:
    data = data.take(1).map(shrink)
  with mock.patch.object(tf, 'numpy_function', timed):
    iterator = _prepare(data, builder.get_preprocess_fn(_shrink(pp)), n)
    for _ in range(2):  # The first ones fill caches.
      next(iterator)
  before = spent
  next(iterator)
  return (spent - before) / n * 1e3


def _shrink(pp: str) -> str:
  """The same ops with sizes of a few pixels."""
  ops = [ast.parse(op, mode='eval').body for op in builder.split_ops(pp)]
  for op in ops:
    if isinstance(op, ast.Call) and op.func.id in _SIZED:
      op.args[:1] = [ast.Constant(8)] * len(op.args[:1])
      for keyword in op.keywords:
        if keyword.arg.endswith('size'):
          keyword.value = ast.Constant(8)
  return '|'.join(map(ast.unparse, ops))


def rate(data: tf.data.Dataset, pp: str, threads: int, n: int) -> float:
  """Images a second that come out of tf.data with so many threads."""
  iterator = _prepare(data, builder.get_preprocess_fn(pp), n, threads)
  for _ in range(2):
    next(iterator)
  start = time.perf_counter()
  for _ in range(5):
    next(iterator)
  return 5 * n / (time.perf_counter() - start)


def _big_vision(folder: str) -> Callable[[str], Preprocess]:
  """The `get_preprocess_fn` of a checkout of google-research/big_vision."""
  sys.path.insert(0, os.path.expanduser(folder))
  theirs = importlib.import_module('big_vision.pp.builder')
  for name in ('ops_general', 'ops_image', 'archive.randaug'):
    try:
      importlib.import_module(f'big_vision.pp.{name}')
    except ImportError as e:
      print(f'big_vision.pp.{name} does not import: {e}; its ops are left out')

  def make(pp: str) -> Preprocess:
    fn = theirs.get_preprocess_fn(pp, log_data=False)
    return lambda features, seed: fn(dict(features))

  return make


def measure_line(
  data: tf.data.Dataset,
  pp: str,
  n: int,
  rounds: int,
  against: Callable[[str], Preprocess] | None = None,
) -> list[dict[str, Any]]:
  """Measures a pp string op by op.

  Args:
    data: raw examples.
    pp: the string.
    n: examples a round.
    rounds: how often to measure.
    against: makes another implementation's function of a pp string.

  Returns:
    A row for tf.data alone and one for each op: `op`, `ms`, `python_ms` and,
    with `against`, `their_ms`, None for a string that it cannot run.
  """
  ops = builder.split_ops(pp)
  prefixes = ['|'.join(ops[:i]) for i in range(len(ops) + 1)]
  ours = [Line(data, builder.get_preprocess_fn(p), n) for p in prefixes]
  theirs = []
  for prefix in prefixes if against else ():
    try:
      theirs.append(Line(data, against(prefix), n))
    except Exception as e:  # Of code that is not ours.
      print(f'big_vision: {prefix}: {type(e).__name__}: {e}')
      theirs.append(None)
  for _ in range(rounds):
    for line in (*ours, *filter(None, theirs)):
      line.measure()
  rows = []
  for i, line in enumerate(ours):
    row = {'op': ops[i - 1] if i else '(tf.data alone)', 'ms': line.ms}
    row['python_ms'] = python_ms(data, prefixes[i])
    if theirs:
      row['their_ms'] = theirs[i].ms if theirs[i] else None
    rows.append(row)
  return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
  """The rows of `measure_line` as a table."""
  width = max(len(row['op']) for row in rows)
  compared = 'their_ms' in rows[0]
  lines = [
    f'{"":{width}}  CPU ms    + op  images/s  Python ms'
    + ('  big_vision  ratio' if compared else '')
  ]
  before = None
  for row in rows:
    added = '' if before is None else f'{row["ms"] - before:+.3f}'
    line = f'{row["op"]:{width}}  {row["ms"]:6.3f}  {added:>6}'
    line += f'  {1000 / row["ms"]:8.0f}  {row["python_ms"]:9.3f}'
    if compared and row['their_ms'] is not None:
      line += f'  {row["their_ms"]:10.3f}  {row["their_ms"] / row["ms"]:5.2f}'
    lines.append(line)
    before = row['ms']
  return '\n'.join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Of the subcommand."""
  parser.add_argument('--config', metavar='FILE[:ARG]', help='its data and pp')
  parser.add_argument('--pp', help='a pp string, in place of the usual ones')
  parser.add_argument('--images', type=int, default=100, help='default: 100')
  parser.add_argument('--rounds', type=int, default=9, help='default: 9')
  parser.add_argument(
    '--img_per_sec_chip',
    type=float,
    default=2500,
    help='what a chip trains on, for the cores that it needs; default: 2500',
  )
  parser.add_argument(
    '--against', metavar='DIR', help='a checkout of google-research/big_vision'
  )


def run(args: argparse.Namespace) -> None:
  """Measures and prints."""
  if args.config:
    config = load_config(args.config)
    builder.import_ops(config.pp_modules)
    data, what = _examples(config, args.images)
    lines = [args.pp or config.input.pp]
  else:
    builder.import_ops(config_lib.FIELDS['pp_modules'].default)
    data, what = _synthetic(args.images)
    lines = [args.pp] if args.pp else LINES
  against = _big_vision(args.against) if args.against else None
  print(f'{what}; {args.rounds} rounds of {args.images}')
  for pp in lines:
    print(f'\n{pp}\n')
    rows = measure_line(data, pp, args.images, args.rounds, against)
    print(format_rows(rows))
    one, two = (rate(data, pp, threads, args.images) for threads in (1, 2))
    cores = args.img_per_sec_chip * rows[-1]['ms'] / 1000
    print(
      f'\n1 thread {one:.0f} images/s, 2 threads {two:.0f}:'
      f' {two / one:.2f} times as many ({os.cpu_count()} cores here).'
      f'\n{cores:.1f} cores feed a chip that takes'
      f' {args.img_per_sec_chip:g} images/s.'
    )
