"""Ops on text. A config that uses them has "ops_text" in its pp_modules.

All but `tokenize` need no further package.
"""

import string
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from big_vision_dpn.config import ConfigError, unknown
from big_vision_dpn.datasets.imagenet import class_names
from big_vision_dpn.pp.ops_lookup import read_file
from big_vision_dpn.pp.registry import Features, register
from big_vision_dpn.pp.rng import Rng

if TYPE_CHECKING:
  import sentencepiece

# The names of big_vision, for SentencePiece models that Google published.
KNOWN_TOKENIZERS = {
  'mc4': 'gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model',
  'cc_all': 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model',
  'c4_en': 'gs://t5-data/vocabs/cc_en.32000/sentencepiece.model',
  't5': 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model',
  'mt5': 'gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model',
}

# By path, for the life of the process: a run makes the same op for training
# and for every evaluator. A file that changes is not read again.
_models: dict[str, 'sentencepiece.SentencePieceProcessor'] = {}
_loading = threading.Lock()


def load_model(name: str) -> 'sentencepiece.SentencePieceProcessor':
  """The SentencePiece model of that name or path, read once a process.

  Encoding with it changes nothing in it, so threads may share it.

  Args:
    name: one of KNOWN_TOKENIZERS, or a path, local or gs://.

  Raises:
    ConfigError: sentencepiece is not installed, or the file cannot be read or
      is no SentencePiece model.
  """
  try:
    import sentencepiece
  except ImportError as e:
    raise ConfigError(
      'tokenize needs the package sentencepiece; run'
      " pip install 'big_vision_dpn[text]'"
    ) from e
  path = KNOWN_TOKENIZERS.get(name, name)
  with _loading:
    if path not in _models:
      model = sentencepiece.SentencePieceProcessor()
      try:
        model.LoadFromSerializedProto(_read_model(name, path))
      except RuntimeError as e:
        raise ConfigError(
          f'{path!r} is no SentencePiece model ({e}); expected a file such as'
          ' sentencepiece.model, in whole'
        ) from e
      _models[path] = model
    return _models[path]


def _read_model(name: str, path: str) -> bytes:
  try:
    return read_file(path, 'tokenize')
  except ConfigError as e:
    if name in KNOWN_TOKENIZERS:
      url = path.replace('gs://', 'https://storage.googleapis.com/')
      hint = (
        f'. Without access to it, fetch {url} elsewhere and give the path of'
        ' the copy as model'
      )
    else:
      hint = f', or name a known model: {", ".join(sorted(KNOWN_TOKENIZERS))}'
    raise ConfigError(f'{e}{hint}') from e


@register('tokenize', random=True)
def tokenize(
  max_len: int,
  eos: str,
  model: str = 'c4_en',
  lower: bool = True,
  sample_if_multi: bool = True,
  pad_value: str | int = '<pad>',
  add_bos: bool = False,
  *,
  key: str | None = None,
  inkey: str | None = None,
  outkey: str | None = None,
) -> Callable[[Features, Rng], Features]:
  """Turns text into the ids of SentencePiece pieces, int32.

  Text is UTF-8. Its bytes go to SentencePiece as they are, as in big_vision;
  each byte that is no UTF-8 counts as one unknown character.

  With 1 for the end, 0 for padding and max_len=4:

      pieces     7 8        7 8 9 5 6
      "none"     7 8 0 0    7 8 9 5
      "yes"      7 8 1 0    7 8 9 5
      "sticky"   7 8 1 0    7 8 9 1

  Args:
    max_len: the length, to which ids are cut or padded.
    eos: whether the end is marked: "none", "yes", or "sticky", which keeps the
      mark when the text is cut. Models that read the last token need that.
    model: one of KNOWN_TOKENIZERS, or the path of a SentencePiece model.
    lower: turns A-Z into a-z before; other letters stay, as in big_vision.
    sample_if_multi: from a feature with several texts one is drawn, and the
      result is [max_len]; none at all counts as one empty text. Otherwise a
      feature of shape [...] gives [..., max_len].
    pad_value: the piece, or its id, that fills up.
    add_bos: the model's mark of the beginning comes first.
    key: the feature to read and write.
    inkey: the feature to read, in place of `key`.
    outkey: the feature to write, in place of `key`; without both "labels".

  Raises:
    ConfigError: a bad argument, or what `load_model` raises.
  """
  if type(max_len) is not int or max_len < 1:
    raise ConfigError(f'max_len is {max_len!r}; expected 1 or more tokens')
  if eos not in ('yes', 'none', 'sticky'):
    raise unknown('value of eos', eos, ('yes', 'none', 'sticky'))
  source, target = inkey or key, outkey or key or 'labels'
  if source is None:
    raise ConfigError('expected inkey="…", the feature that has the text')
  processor = load_model(model)
  encode = _encoder(
    processor,
    max_len,
    _marks(processor, model, eos != 'none', add_bos),
    _pad_id(pad_value, processor, model),
    lower=lower,
    sticky=eos == 'sticky',
  )

  def fn(features: Features, rng: Rng) -> Features:
    text = _string(source, features[source])
    if sample_if_multi and text.shape.rank:
      text = _draw(text, rng)
    # Without side effects, so that tf.data may run it in any order.
    ids = tf.numpy_function(
      encode, [tf.reshape(text, [-1])], tf.int32, stateful=False
    )
    ids = tf.reshape(ids, tf.concat([tf.shape(text), [max_len]], axis=0))
    return {**features, target: tf.ensure_shape(ids, [*text.shape, max_len])}

  return fn


def _encoder(
  processor: 'sentencepiece.SentencePieceProcessor',
  max_len: int,
  marks: tuple[list[int], list[int]],
  pad: int,
  *,
  lower: bool,
  sticky: bool,
) -> Callable[[np.ndarray], np.ndarray]:
  prefix, suffix = marks

  def encode(texts: np.ndarray) -> np.ndarray:
    """A vector of bytes -> [n, max_len]."""
    result = np.full([len(texts), max_len], pad, np.int32)
    for row, text in zip(result, texts, strict=True):
      # bytes.lower changes A-Z alone.
      pieces = processor.encode(text.lower() if lower else text)
      ids = (prefix + pieces + suffix)[:max_len]
      row[: len(ids)] = ids
      if sticky and len(ids) == max_len:
        row[-1:] = suffix
    return result

  return encode


def _marks(
  processor: 'sentencepiece.SentencePieceProcessor',
  model: str,
  eos: bool,
  bos: bool,
) -> tuple[list[int], list[int]]:
  """What comes before and behind the pieces."""
  for wanted, argument, mark in (
    (bos, 'add_bos', processor.bos_id()),
    (eos, 'eos', processor.eos_id()),
  ):
    if wanted and mark < 0:
      raise ConfigError(
        f'{argument} asks for a mark that the model {model!r} does not have;'
        ' expected add_bos=False and eos="none", or another model'
      )
  return [processor.bos_id()] * bos, [processor.eos_id()] * eos


def _pad_id(
  pad_value: Any, processor: 'sentencepiece.SentencePieceProcessor', model: str
) -> int:
  if type(pad_value) is int and -(2**31) <= pad_value < 2**31:
    return pad_value
  if not isinstance(pad_value, str):
    raise ConfigError(f'pad_value is {pad_value!r}; expected a piece or an id')
  piece = processor.piece_to_id(pad_value)
  if processor.id_to_piece(piece) != pad_value:
    raise ConfigError(
      f'pad_value is {pad_value!r}, a piece that the model {model!r} does not'
      ' have; expected one of its pieces, such as "</s>", or an id, such as 0'
    )
  return piece


def _string(key: str, value: Any) -> tf.Tensor:
  text = tf.convert_to_tensor(value)
  if text.dtype != tf.string or text.shape.rank is None:
    raise ConfigError(
      f'{key!r} has dtype {text.dtype.name} and shape {text.shape}; expected'
      ' text: strings in a tensor whose number of axes is known'
    )
  return text


def _draw(texts: tf.Tensor, rng: Rng) -> tf.Tensor:
  """One of any number of texts; an empty one if there is none."""
  texts = tf.reshape(texts, [-1])
  place = rng.integer(tf.maximum(tf.size(texts), 1))
  return tf.concat([texts, ['']], axis=0)[place]


@register('coco_captions')
def coco_captions(outkey: str = 'captions') -> Callable[[Features], Features]:
  """Takes the captions of TFDS's coco_captions out of their nested feature.

  Args:
    outkey: the feature to write, strings of shape [n]; n is mostly 5.
  """

  def fn(features: Features) -> Features:
    captions = features['captions']
    if not isinstance(captions, dict) or 'text' not in captions:
      raise ConfigError(
        "expected a feature 'captions' with a part 'text', as the data set"
        f' coco_captions has it; got {captions}'
      )
    return {**features, outkey: captions['text']}

  return fn


@register('clip_i1k_label_names')
def clip_i1k_label_names(
  *,
  key: str | None = None,
  inkey: str | None = None,
  outkey: str | None = None,
) -> Callable[[Features], Features]:
  """Turns labels of ImageNet-1k into the names that CLIP gives the classes.

  Integers of any shape become strings of the same shape.

  Args:
    key: the feature to read and write.
    inkey: the feature to read, in place of `key`; without both "label".
    outkey: the feature to write, in place of `key`; without both "labels".

  The function raises InvalidArgumentError at run time for a label that no
  class has.
  """
  return _names(class_names.clip_i1k(), inkey or key, outkey or key)


@register('i21k_label_names')
def i21k_label_names(
  *,
  key: str | None = None,
  inkey: str | None = None,
  outkey: str | None = None,
) -> Callable[[Features], Features]:
  """Turns labels of ImageNet-21k into WordNet's names, "tench, Tinca tinca".

  Arguments and errors are those of `clip_i1k_label_names`.
  """
  return _names(class_names.i21k(), inkey or key, outkey or key)


def _names(
  names: list[str], source: str | None, target: str | None
) -> Callable[[Features], Features]:
  source, target = source or 'label', target or 'labels'

  def fn(features: Features) -> Features:
    labels = tf.convert_to_tensor(features[source])
    if not labels.dtype.is_integer:
      raise ConfigError(
        f'{source!r} has dtype {labels.dtype.name}; expected integer labels'
      )
    chosen = tf.gather(tf.constant(names), tf.cast(labels, tf.int64))
    return {**features, target: chosen}

  return fn


@register('lower', key='text')
def lower() -> Callable[[tf.Tensor], tf.Tensor]:
  """Turns A-Z into a-z, in strings of any shape; other letters stay."""
  return lambda text: tf.strings.lower(text)


@register('strfmt')
def strfmt(
  template: str, outkey: str = 'text'
) -> Callable[[Features], Features]:
  """Fills features into a text.

  Args:
    template: e.g. "a photo of a {label}"; a doubled brace is a brace. A number
      is written as TensorFlow prints it, a vector as "[1 2 3]". Strings of
      shape [n] give n texts.
    outkey: the feature to write.
  """
  try:
    parts = list(string.Formatter().parse(template))
  except (TypeError, ValueError) as e:
    raise ConfigError(f'template is {template!r}: {e}') from e
  for _, key, form, conversion in parts:
    if key == '' or form or conversion:
      raise ConfigError(
        f"template is {template!r}; expected braces with a feature's name and"
        ' nothing else, such as {label}'
      )

  def fn(features: Features) -> Features:
    texts = []
    for literal, key, _, _ in parts:
      texts.append(tf.constant(literal))
      if key is not None:
        texts.append(_as_text(features[key]))
    return {**features, outkey: tf.strings.join(texts)}

  return fn


def _as_text(value: Any) -> tf.Tensor:
  value = tf.convert_to_tensor(value)
  if value.dtype == tf.string:
    return value
  return tf.strings.format('{}', value, summarize=-1)
