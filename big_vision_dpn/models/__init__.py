"""Models by name.

A model module has `Model(num_classes, **config.model)`, a flax module, and
`load(init_params, config.model_init, config.model, image_size=(h, w),
**config.model_load)`, which gives it pretrained parameters.
"""

import importlib
from types import ModuleType

from big_vision_dpn.config import choose

MODELS = {'vit': 'big_vision_dpn.models.vit'}


def module(name: str) -> ModuleType:
  """The module that `config.model_name` names."""
  return importlib.import_module(choose('model', name, MODELS))
