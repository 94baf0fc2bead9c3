"""Downloads and prepares TFDS data sets.

    bash tools/run.sh tools.prepare_data cifar10 imagenet_v2 [--data_dir=FOLDER]

What is there already is left alone. A data set whose files need an account,
such as imagenet2012, says which files to put where.

One that is prepared with Apache Beam, such as imagenet21k, runs where Beam's
options say, which are those of TFDS's own command line:

    bash tools/run.sh tools.prepare_data imagenet21k/winter21 \
      --data_dir=gs://BUCKET/tensorflow_datasets --beam_runner=DataflowRunner \
      --beam_pipeline_options=project=P,region=R,temp_location=gs://BUCKET/tmp

Without them it runs here, which suits small data: what is shuffled, all of it,
is held in memory.
"""

import argparse
import sys
from typing import Any

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import tfds as tfds_source


def parse_beam_options(runner: str | None, options: str | None) -> Any:
  """Beam's PipelineOptions, or None where none are given.

  Args:
    runner: where the pipeline runs, e.g. "DataflowRunner".
    options: other flags of Beam and of the runner, without their dashes, with
      commas between them: "project=P,region=R".

  Raises:
    ConfigError: Beam is not installed.
  """
  flags = [f'runner={runner}'] if runner else []
  flags += options.split(',') if options else []
  if not flags:
    return None
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ModuleNotFoundError as e:
    raise ConfigError(
      f'options of Apache Beam are given, but {e}: pip install'
      ' "apache-beam>=2.70,<3"'
    ) from e
  return PipelineOptions([f'--{flag}' for flag in flags])


def prepare(
  name: str, data_dir: str | None, beam_options: Any | None = None
) -> None:
  """Prepares one data set and prints its splits.

  Args:
    name: as for `tfds.builder`.
    data_dir: folder; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    beam_options: PipelineOptions for a data set that needs Apache Beam.

  Raises:
    ConfigError: no such data set, files missing that must be fetched by hand,
      or a download that failed.
  """
  import tensorflow_datasets as tfds

  builder = tfds_source.make_builder(name, data_dir)
  if not builder.info.splits:
    print(f'{name}: preparing {builder.data_dir}', flush=True)
    try:
      builder.download_and_prepare(
        file_format='tfrecord',
        download_config=tfds.download.DownloadConfig(beam_options=beam_options),
      )
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
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='+', metavar='NAME')
  parser.add_argument('--data_dir', help='default: ~/tensorflow_datasets')
  parser.add_argument('--beam_runner', help="Apache Beam's runner")
  parser.add_argument(
    '--beam_pipeline_options', help='its other flags: project=P,region=R'
  )
  args = parser.parse_args(argv)
  try:
    beam_options = parse_beam_options(
      args.beam_runner, args.beam_pipeline_options
    )
  except ConfigError as e:
    print(e, file=sys.stderr)
    return 2
  failed = 0
  for name in args.names:
    try:
      prepare(name, args.data_dir, beam_options)
    except ConfigError as e:
      print(e, file=sys.stderr)
      failed = 2
  return failed


if __name__ == '__main__':
  sys.exit(main())
