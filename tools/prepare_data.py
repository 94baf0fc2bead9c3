"""Downloads and prepares TFDS data sets.

    bash tools/run.sh tools.prepare_data cifar10 imagenet_v2 [--data_dir=FOLDER]

What is there already is left alone. A data set whose files need an account,
such as imagenet2012, says which files to put where.
"""

import argparse
import sys

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import tfds as tfds_source


def prepare(name: str, data_dir: str | None) -> None:
  """Prepares one data set and prints its splits.

  Raises:
    ConfigError: no such data set, files missing that must be fetched by hand,
      or a download that failed.
  """
  import tensorflow_datasets as tfds

  builder = tfds_source.make_builder(name, data_dir)
  if not builder.info.splits:
    print(f'{name}: preparing {builder.data_dir}', flush=True)
    try:
      builder.download_and_prepare(file_format='tfrecord')
    except (AssertionError, OSError) as e:
      raise ConfigError(
        f'{name}: {e}\n{tfds_source.how_to_prepare(builder, name, data_dir)}'
      ) from e
    except tfds.download.DownloadError as e:
      raise ConfigError(f'{name}: the download failed: {e}') from e
  sizes = {k: f'{s.num_examples:,}' for k, s in builder.info.splits.items()}
  splits = ', '.join(f'{k} {n}' for k, n in sizes.items())
  print(f'{name}: {splits} in {builder.data_dir}')


def main(argv: list[str] | None = None) -> int:
  """Prepares all names; returns the exit code, 2 if any could not be."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='+', metavar='NAME')
  parser.add_argument('--data_dir', help='default: ~/tensorflow_datasets')
  args = parser.parse_args(argv)
  failed = 0
  for name in args.names:
    try:
      prepare(name, args.data_dir)
    except ConfigError as e:
      print(e, file=sys.stderr)
      failed = 2
  return failed


if __name__ == '__main__':
  sys.exit(main())
