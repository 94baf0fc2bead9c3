"""Measures what a run is made of; see input.py and step.py.

bash tools/run.sh tools.benchmark input --help
bash tools/run.sh tools.benchmark step --help
"""

import importlib.util
import os

import ml_collections

from big_vision_dpn import config


def load_config(text: str) -> ml_collections.ConfigDict:
  """The config of FILE[:ARG], checked and complete.

  Raises:
    ConfigError: no such file, or what the config itself raises.
  """
  path, _, arg = text.partition(':')
  spec = importlib.util.spec_from_file_location('benchmarked_config', path)
  if spec is None or not os.path.exists(path):
    raise config.ConfigError(f'--config: no file {path}')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return config.resolve(module.get_config(arg or None))
