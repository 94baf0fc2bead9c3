"""Text ops, against sentencepiece itself and plain Python."""

import io
import random
import sys

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from big_vision_dpn import config
from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets.imagenet21k import builder as imagenet21k_builder
from big_vision_dpn.pp import builder
from big_vision_dpn.pp.builder import get_preprocess_fn

KEY = tf.constant([1, 2])
WORDS = [
  *('a', 'photo', 'of', 'the', 'small', 'red', 'dog', 'cat', 'house'),
  *('tree', 'river', 'on', 'under', 'über'),
]
PAD, EOS, BOS = 0, 1, 3


@pytest.fixture(scope='module', autouse=True)
def text_ops():
  builder.import_ops(['ops_text'])


def _write_model(path, vocab_size, **options):
  rng = random.Random(0)
  text = [' '.join(rng.choices(WORDS, k=8)) for _ in range(500)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_writer=model,
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  path.write_bytes(model.getvalue())
  return str(path)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return _write_model(
    tmp_path_factory.mktemp('text') / 'sentencepiece.model',
    200,
    pad_id=PAD,
    eos_id=EOS,
    unk_id=2,
    bos_id=BOS,
  )


@pytest.fixture(scope='module')
def pieces(model):
  processor = sentencepiece.SentencePieceProcessor(model_file=model)
  return processor.encode


def _tokens(text, model, max_len, arguments='eos="yes"', key=KEY):
  pp = f'tokenize({max_len}, {arguments}, model={model!r}, key="t")'
  features = get_preprocess_fn(pp)({'t': tf.constant(text)}, key)
  return features['t'].numpy()


TEXT = 'a photo of the small red dog'


@pytest.mark.parametrize('eos', ['yes', 'none', 'sticky'])
@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('extra', [-2, 0, 1, 5])
def test_marks_padding_and_cutting(model, pieces, eos, bos, extra):
  ids = [BOS] * bos + pieces(TEXT)
  max_len = len(ids) + extra
  ends = ids + [EOS] * (eos != 'none')
  want = (ends + [PAD] * max_len)[:max_len]
  if eos == 'sticky' and len(ends) >= max_len:
    want[-1] = EOS
  got = _tokens(TEXT, model, max_len, f'eos={eos!r}, add_bos={bos}')
  assert got.dtype == np.int32
  assert got.tolist() == want


def test_lower_and_padding_by_piece_or_id(model, pieces):
  ids = pieces(TEXT)
  upper = _tokens(TEXT.upper(), model, len(ids), 'eos="none"')
  assert upper.tolist() == ids
  as_is = _tokens('A Dog', model, 9, 'eos="none", lower=False').tolist()
  assert as_is == (pieces('A Dog') + [PAD] * 9)[:9]
  assert as_is != _tokens('A Dog', model, 9, 'eos="none"').tolist()
  by_id = _tokens('', model, 3, 'eos="none", pad_value=7')
  assert by_id.tolist() == [7, 7, 7]
  by_piece = _tokens('', model, 3, 'eos="none", pad_value="</s>"')
  assert by_piece.tolist() == [EOS] * 3


@pytest.mark.parametrize(
  'text', ['', ' ', 'ü dog', b'\xff\xfe dog', b'dog \xf0\x9f', 'dog\x00cat']
)
def test_odd_text(model, pieces, text):
  raw = text.encode() if isinstance(text, str) else text
  want = (pieces(raw.lower()) + [EOS] + [PAD] * 20)[:20]
  assert _tokens(text, model, 20).tolist() == want


def test_very_long_text_is_cut(model, pieces):
  got = _tokens('dog ' * 50_000, model, 16, 'eos="sticky"')
  assert got.tolist() == [*pieces('dog ' * 20)[:15], EOS]


def test_one_of_several_texts_is_drawn_or_all_are_taken(model, pieces):
  texts = ['red dog', 'small cat', 'house']
  want = [(pieces(t) + [EOS] + [PAD] * 8)[:8] for t in texts]
  every = _tokens(texts, model, 8, 'eos="yes", sample_if_multi=False')
  assert every.tolist() == want
  drawn = [
    want.index(_tokens(texts, model, 8, key=tf.constant([i, 0])).tolist())
    for i in range(150)
  ]
  # 50 each on average, with a standard deviation of 5.8.
  assert np.bincount(drawn, minlength=3).min() > 20
  nothing = _tokens(tf.zeros([0], tf.string), model, 2)
  assert nothing.tolist() == [EOS, PAD]


def test_shapes_are_static_and_threads_agree(model, pieces):
  pp = f'tokenize(6, eos="yes", model={model!r}, inkey="t")'
  texts = [' '.join(random.Random(i).choices(WORDS, k=4)) for i in range(200)]
  data = tf.data.Dataset.from_tensor_slices(texts).map(
    lambda t: get_preprocess_fn(pp)({'t': t}, KEY), num_parallel_calls=8
  )
  assert data.element_spec['labels'] == tf.TensorSpec([6], tf.int32)
  got = [e['labels'].tolist() for e in data.as_numpy_iterator()]
  assert got == [(pieces(t) + [EOS] + [PAD] * 6)[:6] for t in texts]


def test_a_model_without_marks(tmp_path):
  model = _write_model(tmp_path / 'm', 60, bos_id=-1, eos_id=-1, unk_id=0)
  for arguments, word in (
    ('eos="yes"', 'eos'),
    ('eos="none", add_bos=True', 'add_bos'),
  ):
    with pytest.raises(ConfigError, match=f'{word} asks for a mark'):
      _tokens('a', model, 3, f'{arguments}, pad_value=0')
  with pytest.raises(ConfigError, match="'<pad>', a piece that the model"):
    _tokens('a', model, 3, 'eos="none"')


def test_a_file_that_is_no_model(tmp_path):
  (tmp_path / 'x').write_text('hello')
  with pytest.raises(ConfigError, match='is no SentencePiece model'):
    _tokens('a', str(tmp_path / 'x'), 3)
  with pytest.raises(ConfigError, match='cannot read') as e:
    _tokens('a', str(tmp_path / 'y'), 3)
  assert str(tmp_path / 'y') in str(e.value)
  assert 'or name a known model: c4_en' in str(e.value)


def test_without_sentencepiece(monkeypatch, model):
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(ConfigError, match='pip install'):
    _tokens('a', model, 3)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('0, eos="yes", key="t"', 'max_len is 0'),
    ('4, eos="maybe", key="t"', "unknown value of eos 'maybe'"),
    ('4, eos="yes"', 'expected inkey='),
    ('4, eos="yes", key="t", pad_value=1.5', 'pad_value is 1.5'),
  ],
)
def test_mistakes_of_tokenize(model, arguments, message):
  with pytest.raises(ConfigError) as e:
    get_preprocess_fn(f'tokenize({arguments}, model={model!r})')
  assert message in str(e.value)


def test_numbers_are_no_text(model):
  with pytest.raises(ConfigError, match="'t' has dtype int32"):
    _tokens([1, 2], model, 3)


def _run(pp, **features):
  features = {k: tf.constant(v) for k, v in features.items()}
  result = get_preprocess_fn(pp)(features, KEY)
  return {k: v.numpy() for k, v in result.items()}


def test_lower():
  assert _run('lower', text='A DÖG')['text'].decode() == 'a dÖg'
  both = _run('lower(inkey="x", outkey="y")', x=['A', 'bC'])
  assert both['y'].tolist() == [b'a', b'bc']


@pytest.mark.parametrize(
  ('template', 'want'),
  [
    ('a photo of a {name}, {n}', b'a photo of a dog, 3'),
    ('{{{name}}}', b'{dog}'),
    ('{v}', b'[1 2]'),
    ('nothing', b'nothing'),
    ('', b''),
  ],
)
def test_strfmt(template, want):
  features = {'name': 'dog', 'n': 3, 'v': [1, 2]}
  assert _run(f'strfmt({template!r})', **features)['text'] == want


def test_strfmt_of_several():
  got = _run('strfmt("the {x}", outkey="y")', x=['cat', 'dog'])['y']
  assert got.tolist() == [b'the cat', b'the dog']


@pytest.mark.parametrize('template', ['{', '{}', '{x:3}', '{x!r}', 'a } b'])
def test_strfmt_mistakes(template):
  with pytest.raises(ConfigError, match='template is'):
    get_preprocess_fn(f'strfmt({template!r})')


def test_strfmt_of_a_feature_that_is_not_there():
  with pytest.raises(ConfigError, match=r"unknown feature 'nam'.*'name'"):
    _run('strfmt("{nam}")', name='x')


def test_label_names():
  assert _run('clip_i1k_label_names', label=0)['labels'] == b'tench'
  several = _run('clip_i1k_label_names(key="l")', l=[[340, 388]])['l']
  assert several.tolist() == [[b'zebra', b'giant panda']]
  # Banana is n07753592 in both.
  label = imagenet21k_builder.wnids().index('n07753592')
  assert b'banana' in _run('i21k_label_names', label=label)['labels']
  with pytest.raises(ConfigError, match='expected integer labels'):
    _run('clip_i1k_label_names', label=0.5)


def test_coco_captions():
  run = get_preprocess_fn('coco_captions("c")')
  features = {'captions': {'text': tf.constant(['a', 'b']), 'id': [1, 2]}}
  assert run(features, KEY)['c'].numpy().tolist() == [b'a', b'b']
  with pytest.raises(ConfigError, match="with a part 'text'"):
    run({'captions': tf.constant(['a'])}, KEY)


def test_text_ops_only_where_they_are_named():
  assert 'ops_text' not in config.FIELDS['pp_modules'].default
