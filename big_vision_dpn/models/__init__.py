"""Models by name. A model module has `Model(...)` and `load(...)`."""

import importlib
from types import ModuleType

from big_vision_dpn.config import choose

MODELS = {'vit': 'big_vision_dpn.models.vit'}


def module(name: str) -> ModuleType:
  """The module that `config.model_name` names."""
  return importlib.import_module(choose('model', name, MODELS))
