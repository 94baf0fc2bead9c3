"""The names of ImageNet's classes, in the order of their labels.

`clip_i1k_names.txt`: the 1,000 of ILSVRC 2012, as the authors of CLIP curated
them (github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb);
here from open_clip_torch 3.3.0. "missile" and "sunglasses" stand there twice.

`i21k_names.txt`: the 21,843 of ImageNet-21k as Google's models count them, by
ascending WordNet id; here from timm 1.0.31 (imagenet21k_goog_synsets.txt and
imagenet_synset_to_lemma.txt). A name is all lemmas of the WordNet 3.0 synset,
such as "tench, Tinca tinca"; different synsets may have the same ones.
"""

import importlib.resources


def clip_i1k() -> list[str]:
  """CLIP's names of the 1,000 classes of ImageNet-1k."""
  return _read('clip_i1k_names.txt')


def i21k() -> list[str]:
  """WordNet's names of the 21,843 classes of ImageNet-21k."""
  return _read('i21k_names.txt')


def _read(name: str) -> list[str]:
  file = importlib.resources.files(__package__) / name
  return file.read_text(encoding='utf-8').splitlines()
