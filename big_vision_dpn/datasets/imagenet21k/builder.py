"""ImageNet-21k, all of ImageNet, which TFDS lacks.

Labels are the 21,843 classes of Google's public models, so that their heads
carry over: the sorted WordNet ids of wnids.txt, as published with Big Transfer
(imagenet21k_wordnet_ids.txt) and in timm (imagenet21k_goog_synsets.txt). They
are the 21,841 synsets of the fall 2011 release and two of which it has no
image, n03931044 and n09859684. The winter 2021 release has a part of them and
uses the same labels. All images are in one split, `full`, as in big_vision's
configs, which keep `full[:51200]` for validation.

Google's copy of the data is not public, and smaller (about 12.4 million
images): duplicates are merged in it, which is not done here.
"""

import dataclasses
import functools
import importlib.resources
import importlib.util
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets.imagenet21k import tars

# Beam's counters are found by it.
_NAMESPACE = 'imagenet21k'


@functools.cache
def wnids() -> tuple[str, ...]:
  """The WordNet id of every label: 21,843, sorted."""
  file = importlib.resources.files(__package__) / 'wnids.txt'
  return tuple(file.read_text().split())


@dataclasses.dataclass(eq=False, kw_only=True)
class Release(tfds.core.BuilderConfig):
  """A release of ImageNet.

  Attributes:
    archive: name of its tar without ".tar", or of a folder of per-synset tars.
    num_synsets: the tars in it; another number is an error.
    num_images: the images in them.
    max_lost: how many of these may be absent or broken; one more is an error.
  """

  archive: str
  num_synsets: int
  num_images: int
  max_lost: int = 0

  @property
  def sizes(self) -> dict[str, int]:
    """Examples by split, before the data is there; a few may be broken."""
    return {'full': self.num_images}


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
  """The data set, prepared with Apache Beam. See the module's docstring.

  An example has `image` (the file as it is, almost always a JPEG), `label` and
  `file_name`, which is the key. A file that TensorFlow cannot decode is left
  out, logged and counted (Beam's counter `undecodable`).
  """

  name = 'imagenet21k'
  VERSION = tfds.core.Version('1.0.0')
  # The first is the default. The counts of fall11 are those that ImageNet's
  # site gave (21,841 and 14,197,122). MXNet's tutorial, made from the same tar,
  # counts 14,197,087, so that many at least are there. Those of winter21 are
  # of two independent holders of the data: the notes of Canada's Digital
  # Research Alliance on its copy, and the data set analysis of Visual Layer.
  # How many files are broken is known of neither: timm's author mends 20 of
  # winter21. So a thousandth may be lost. A file cut short loses more: whole
  # synsets, which are counted exactly, before any image is read.
  BUILDER_CONFIGS = [  # noqa: RUF012  TFDS wants a list.
    Release(
      name='fall11',
      description='fall 2011, 1.3 TB, no longer offered by ImageNet',
      archive='fall11_whole',
      num_synsets=21_841,
      num_images=14_197_122,
      max_lost=14_197,
    ),
    Release(
      name='winter21',
      description='winter 2021, 1.1 TB, without most synsets of persons',
      archive='winter21_whole',
      num_synsets=19_167,
      num_images=13_153_500,
      max_lost=13_153,
    ),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """\
imagenet21k/winter21: an account at https://image-net.org/download-images.php
gives winter21_whole.tar.gz (1.1 TB, MD5 ab313ce03179fd803a401b02c651c0a2). A
compressed tar can only be read from its start, so unpack it once, to a folder
of 19,167 tars:
  mkdir winter21_whole
  tar -xzf winter21_whole.tar.gz -C winter21_whole
or, to one tar, with gunzip winter21_whole.tar.gz.
imagenet21k/fall11, the default: fall11_whole.tar (1.3 TB) as it is, or a folder
fall11_whole of its 21,841 tars. ImageNet no longer offers it.
The tars of the synsets stay packed. The folder may be on gs://. It needs Apache
Beam: pip install "apache-beam>=2.70,<3"
"""
  _undecodable: int | None = None

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=f'ImageNet-21k, {self.builder_config.description}.',
      homepage='https://image-net.org/',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(names=wnids()),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    manual_dir = str(dl_manager.manual_dir)  # An error where there is none.
    if importlib.util.find_spec('apache_beam') is None:
      raise ConfigError(
        'imagenet21k is prepared with Apache Beam, which is not installed here:'
        ' pip install "apache-beam>=2.70,<3"'
      )
    synsets = find_synsets(manual_dir, self.builder_config)
    return {'full': self._generate_examples(synsets)}

  def _generate_examples(self, synsets: list[tars.Synset]) -> Any:
    import apache_beam as beam

    return (
      'Synsets' >> beam.Create(synsets)
      | 'Spread' >> beam.Reshuffle()  # Or one worker gets them all.
      | 'Read' >> beam.FlatMap(_examples)
    )

  def _process_pipeline_result(self, pipeline_result: Any) -> None:
    from apache_beam.metrics import MetricsFilter

    mine = MetricsFilter().with_namespace(_NAMESPACE)
    counters = pipeline_result.metrics().query(mine)['counters']
    self._undecodable = sum(c.result for c in counters)

  def _download_and_prepare(
    self, dl_manager: Any, download_config: Any
  ) -> None:
    super()._download_and_prepare(dl_manager, download_config)
    # An error here, and TFDS removes what was written.
    num_examples = self.info.splits['full'].num_examples
    check_images(self.builder_config, num_examples, self._undecodable)


def find_synsets(manual_dir: str, release: Release) -> list[tars.Synset]:
  """The synsets' tars of a release, all of them.

  Args:
    manual_dir: the folder that has the release's tar, or its folder of tars.
    release: what is expected.

  Raises:
    ConfigError: none is there, it was cut off, or it is another release.
  """
  path = f'{manual_dir}/{release.archive}'
  if tf.io.gfile.exists(f'{path}.tar'):
    path = f'{path}.tar'
    synsets = tars.index(path)
  elif tf.io.gfile.isdir(path):
    synsets = tars.in_folder(path)
  else:
    packed = tf.io.gfile.exists(f'{path}.tar.gz')
    state = f'{path}.tar.gz is still compressed' if packed else 'neither exists'
    raise ConfigError(
      f'imagenet21k/{release.name} is read from {path}.tar or from a folder'
      f' {path} of per-synset tars, but {state}.\n'
      + Imagenet21k.MANUAL_DOWNLOAD_INSTRUCTIONS
    )
  found = {s.wnid for s in synsets}
  if strange := sorted(found - set(wnids())):
    raise ConfigError(f'{path}: {strange[0]} is no synset of ImageNet-21k')
  if len(found) < len(synsets):
    raise ConfigError(f'{path}: some synsets are there more than once')
  if len(found) != release.num_synsets:
    raise ConfigError(
      f'{path}: {len(found):,} synsets, but imagenet21k/{release.name} has'
      f' {release.num_synsets:,}; is it complete, and that release?'
    )
  return synsets


def check_images(
  release: Release, num_examples: int, undecodable: int | None
) -> None:
  """Compares what was written with what the release has, and logs it.

  Args:
    release: what is expected.
    num_examples: the examples that were written.
    undecodable: the files that were left out; None where that is not known.

  Raises:
    ConfigError: more images, or fewer by more than `release.max_lost`.
  """
  result = (
    f'imagenet21k/{release.name}: {num_examples:,} examples, and the release'
    f' has {release.num_images:,} images;'
    f' {"an unknown number of" if undecodable is None else undecodable} files'
    ' could not be decoded (their names are in the log of the workers)'
  )
  lost = release.num_images - num_examples
  if not 0 <= lost <= release.max_lost:
    raise ConfigError(
      f'{result}. At most {release.max_lost:,} may be lost, so nothing is'
      ' kept; are the tars complete?'
    )
  logging.info('%s', result)


def _examples(synset: tars.Synset) -> Iterator[tuple[str, dict[str, Any]]]:
  """(key, example) of every image of a synset; runs on Beam's workers."""
  from apache_beam.metrics import Metrics

  undecodable = Metrics.counter(_NAMESPACE, 'undecodable')
  for file_name, image in tars.images(synset):
    if tars.is_image(image):
      label = synset.wnid
      yield (
        file_name,
        {'image': image, 'label': label, 'file_name': file_name},
      )
    else:
      undecodable.inc()
      logging.warning('%s is left out: no image', file_name)
