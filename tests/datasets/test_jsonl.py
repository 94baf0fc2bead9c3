"""JSONL files against the objects they were written from."""

import io
import json

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from big_vision_dpn.config import ConfigError
from big_vision_dpn.datasets import core
from big_vision_dpn.pp import builder


def _write(folder, lines):
  path = folder / 'data.jsonl'
  path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')
  return str(path)


def _get(fname, **arguments):
  return core.get(name='bv:jsonl', fname=fname, **arguments)


@pytest.fixture(scope='module')
def captions(tmp_path_factory):
  """(file, its lines): 7 images with 0 to 3 captions."""
  folder = tmp_path_factory.mktemp('captions')
  (folder / 'images').mkdir()
  lines = []
  for i in range(7):
    content = io.BytesIO()
    Image.new('RGB', (4, 5), (i, i, i)).save(content, 'PNG')
    (folder / f'images/{i}.png').write_bytes(content.getvalue())
    lines.append(
      {
        'image': f'images/{i}.png',
        'label': i % 3,
        'score': i if i % 2 else i + 0.5,
        'good': i > 2,
        'text': ['', 'Zürich', 'a b'][i % 3],
        'captions': [f'{i}.{j}' for j in range(i % 4)],
        'box': [i, 0, 4, 5],
      }
    )
  return _write(folder, lines), lines


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_examples_are_the_lines(captions, request, way):
  fname, lines = captions
  source = _get(fname, fopen_keys=['image'])
  examples = request.getfixturevalue(way)(source)
  assert sorted(int(e['id']) for e in examples) == list(range(7))
  for example in examples:
    i = int(example['id'])
    line = lines[i]
    image = tf.io.decode_png(example['image']).numpy()
    np.testing.assert_array_equal(image, np.full((5, 4, 3), i))
    assert example['text'] == line['text'].encode()
    assert [c.decode() for c in example['captions']] == line['captions']
    for key in ('label', 'score', 'good'):
      assert example[key] == line[key]
    assert example['box'].tolist() == line['box']


def test_dtypes_and_shapes(captions):
  assert _get(captions[0]).record_spec == {
    'id': tf.TensorSpec([], tf.string),
    'image': tf.TensorSpec([], tf.string),
    'label': tf.TensorSpec([], tf.int64),
    'score': tf.TensorSpec([], tf.float32),
    'good': tf.TensorSpec([], tf.bool),
    'text': tf.TensorSpec([], tf.string),
    'captions': tf.TensorSpec([None], tf.string),
    'box': tf.TensorSpec([4], tf.int64),
  }


def test_captions_as_a_ragged_feature(captions, infer):
  fname, lines = captions
  pp = builder.get_preprocess_fn('rag_tensor(key="captions")|keep("captions")')
  examples = infer(_get(fname), pp)
  texts = [[c.decode() for c in e['captions'][0]] for e in examples]
  assert texts == [line['captions'] for line in lines]


def test_a_slice_keeps_its_ids_and_shapes(captions, infer):
  source = _get(captions[0], split='all[5:]+all[:1]')
  # Six lists of one length among them, but not in the whole file.
  assert source.record_spec['captions'].shape.rank == 1
  assert [e['id'] for e in infer(source)] == [b'5', b'6', b'0']


@pytest.mark.parametrize(
  ('prefix', 'fopen_keys'),
  [
    ('images/', ['image']),
    ('', {'image': 'images'}),
    ('', ml_collections.ConfigDict({'image': 'images'})),
    ('{folder}/images/', ('image',)),
    ('', {'image': '{folder}/images'}),
    ('file://{folder}/images/', {'image': 'elsewhere'}),
  ],
)
def test_where_paths_start(captions, prefix, fopen_keys, infer):
  folder = captions[0].removesuffix('/data.jsonl')
  if hasattr(fopen_keys, 'items'):
    fopen_keys = {k: v.format(folder=folder) for k, v in fopen_keys.items()}
  fname = f'{folder}/paths.jsonl'
  with open(fname, 'w') as f:
    name = prefix.format(folder=folder) + '3.png'
    f.write(json.dumps({'image': name}))
  (example,) = infer(_get(fname, fopen_keys=fopen_keys))
  with open(f'{folder}/images/3.png', 'rb') as f:
    assert example['image'] == f.read()


def test_strings_come_through_as_bytes(tmp_path, infer):
  (tmp_path / 'data.jsonl').write_bytes(
    b'\xef\xbb\xbf{"t": ""}\r\n\n{"t": "\xff\xfe"}\n{"t": "\\ud83d"}\n'
    b'{"t": "a\\u0000b"}'
  )
  source = _get(str(tmp_path / 'data.jsonl'))
  texts = [e['t'] for e in infer(source)]
  assert texts == [b'', b'\xff\xfe', b'\xed\xa0\xbd', b'a\0b']
  assert 'line 3 of' in source.where(1)  # Empty lines count for an editor.


def test_an_id_of_its_own(tmp_path, infer):
  fname = _write(tmp_path, [{'id': 7}, {'id': 9}])
  assert [e['id'] for e in infer(_get(fname))] == [7, 9]


@pytest.mark.parametrize('way', ['train_epoch', 'infer'])
def test_a_file_that_cannot_be_read_is_named(tmp_path, request, way):
  for i in (0, 1, 3):
    (tmp_path / f'{i}.png').touch()
  fname = _write(tmp_path, [{'image': f'{i}.png'} for i in range(4)])
  source = _get(fname, fopen_keys=['image'])
  with pytest.raises(core.DataError) as e:
    request.getfixturevalue(way)(source)
  assert f'line 3 of {fname}, {tmp_path}/2.png' in str(e.value)


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    ('{"a": 1}\n{"b": 1}', "line 2 of FILE also has 'b' and lacks 'a'"),
    ('{"a": 1}\n\n{"a": "x"}', "line 3 is a string 'x'; expected a number"),
    ('{"a": 1}\n{"a": null}', 'line 2 is null; expected a number'),
    ('{"a": true}\n{"a": 1}', 'line 2 is a number 1; expected true or false'),
    ('{"a": {"b": 1}}', "'a': line 1 is an object; expected a number, a"),
    ('{"a": [1]}\n{"a": 1}', 'line 2 is a number 1; expected a list'),
    ('{"a": 1}\n{"a": [1]}', 'line 2 is a list; expected a number'),
    ('{"a": []}\n{"a": [1, "x"]}', "line 2 is a string 'x'; expected a nu"),
    ('{"a": [[1]]}', "'a': line 1 is a list; expected lists of a number"),
    ('{"a": 99999999999999999999}', 'expected at most 63 bits'),
    ('{"a": 1}\n{"a": 1', 'line 2 of FILE is no JSON'),
    ('[1, 2]', 'line 1 of FILE is a list; expected an object'),
    ('\n', 'FILE holds no examples'),
  ],
)
def test_lines_that_do_not_fit(tmp_path, lines, message):
  path = tmp_path / 'data.jsonl'
  path.write_text(lines)
  with pytest.raises(ConfigError) as e:
    _get(str(path))
  assert message.replace('FILE', str(path)) in str(e.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'fopen_keys': ['imge']}, "'imge'. Did you mean 'image'"),
    ({'fopen_keys': 'image'}, "expected a list of fields, e.g. ['image']"),
    ({'fopen_keys': ['label']}, 'line 1 is a number 0; expected a string'),
    ({'fopen_keys': ['url']}, 'address https://example.com/0; expected the'),
    ({'fopen_keys': ['image']}, '0.png, does not exist; expected paths that'),
    ({'split': 'train'}, "unknown split 'train'. Choices: all"),
    ({'fname': '/no/such.jsonl'}, 'cannot read /no/such.jsonl'),
  ],
)
def test_mistakes_in_arguments(tmp_path, arguments, message):
  line = {'image': '0.png', 'label': 0, 'url': 'https://example.com/0'}
  with pytest.raises(ConfigError) as e:
    _get(**{'fname': _write(tmp_path, [line]), **arguments})
  assert message in str(e.value)
