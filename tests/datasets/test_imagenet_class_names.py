"""The names of ImageNet's classes."""

import itertools
import pathlib

import tensorflow_datasets as tfds

from big_vision_dpn.datasets.imagenet import class_names


def test_files_have_a_name_a_line():
  for names, number in (
    (class_names.clip_i1k(), 1000),
    (class_names.i21k(), 21843),
  ):
    assert len(names) == number
    assert all(n and n == n.strip() and n.isascii() for n in names)


def test_known_places():
  # Labels that everybody knows, of ILSVRC 2012.
  names = class_names.clip_i1k()
  known = {0: 'tench', 1: 'goldfish', 207: 'Golden Retriever', 340: 'zebra',
           388: 'giant panda', 417: 'balloon', 559: 'folding chair',
           817: 'sports car', 954: 'banana', 999: 'toilet paper'}  # fmt: skip
  assert {label: names[label] for label in known} == known


def test_same_number_as_the_labels_of_tfds():
  labels = pathlib.Path(tfds.__file__).parent
  labels /= 'datasets/imagenet2012/labels.txt'
  wnids = labels.read_text().split()
  assert wnids == sorted(wnids)
  assert len(wnids) == len(class_names.clip_i1k())


def test_both_lists_go_by_wordnet_id():
  # So what is before another class in one is so in the other. The names are
  # matched by themselves; those which WordNet gives to more synsets than one,
  # or to another than CLIP, are the few that break the order.
  places = {}
  for place, lemmas in enumerate(class_names.i21k()):
    for lemma in lemmas.lower().split(', '):
      places.setdefault(lemma, []).append(place)
  found = [places.get(n.lower(), []) for n in class_names.clip_i1k()]
  found = [p[0] for p in found if len(p) == 1]
  assert len(found) > 700
  descents = sum(b <= a for a, b in itertools.pairwise(found))
  assert descents < 0.03 * len(found)
