"""`tools.benchmark` runs and names what it measured; no time is asserted."""

import textwrap

import numpy as np
import pytest
import tensorflow as tf

from tools.benchmark import input, step
from tools.benchmark.__main__ import main

SMALL = ['input', '--images=8', '--rounds=1']


def test_the_usual_lines(capsys):
  assert main(SMALL) == 0
  out = capsys.readouterr().out
  for op in ('(tf.data alone)', *'|'.join(input.LINES).split('|')):
    assert f'\n{op} ' in out
  assert '8 synthetic JPEGs of 500 x 375' in out
  assert 'cores feed a chip that takes 2500 images/s' in out


def test_a_config(capsys):
  config = 'configs/proj/dpn/quickstart.py'
  assert main([*SMALL, f'--config={config}']) == 0
  out = capsys.readouterr().out
  assert 'value_range' in out and '8 examples of mnist5k' in out


def test_against(tmp_path, capsys, monkeypatch):
  folder = tmp_path / 'big_vision/pp'
  folder.mkdir(parents=True)
  (folder / 'ops_general.py').touch()
  (folder / 'builder.py').write_text(
    textwrap.dedent("""
      def get_preprocess_fn(pp, log_data=True):
        if 'flip' in pp:
          raise ValueError('no flips here')
        return lambda features: features
    """)
  )
  monkeypatch.setattr('sys.path', [*__import__('sys').path])
  arguments = [*SMALL, '--pp=decode|flip_lr', f'--against={tmp_path}']
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert 'big_vision: decode|flip_lr: ValueError: no flips here' in out
  assert 'big_vision.pp.ops_image does not import' in out


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--pp=decodee'], "Did you mean 'decode'"),
    (['--config=nothing.py'], 'no file nothing.py'),
  ],
)
def test_mistakes(arguments, words, capsys):
  assert main([*SMALL, *arguments]) == 2
  assert words in capsys.readouterr().err


def test_synthetic_jpegs_are_as_large_as_photographs():
  files = input.synthetic_jpegs(5)
  assert all(60_000 < len(f) < 110_000 for f in files)
  images = np.stack([tf.io.decode_jpeg(f) for f in files])
  assert images.shape == (5, 375, 500, 3)
  assert 40 < images.std() < 70 and len({f[-99:] for f in files}) == 5


def test_steps_of_models(capsys):
  arguments = ['step', '--config=configs/proj/dpn/quickstart.py', '--rounds=1']
  models = ['patch_norm=none', 'patch_norm=dual,depth=1']
  assert main([*arguments, *models]) == 0
  header, _, columns, *rows = capsys.readouterr().out.splitlines()
  assert 'quickstart.py, batches of 8, 1 rounds' in header
  assert columns.split() == ['ms', 'images/s', 'ratio', 'GFLOP']
  assert [row.split()[0] for row in rows] == models
  # Three quarters of the blocks are gone.
  assert float(rows[0].split()[4]) > 3 * float(rows[1].split()[4])


def test_fields_of_a_model():
  assert step.parse_fields('patch_norm=dual,depth=3,variant=S/16') == {
    'patch_norm': 'dual',
    'depth': 3,
    'variant': 'S/16',
  }


@pytest.mark.parametrize(
  'model, words',
  [('patch_norm=dula', "mean 'dual'"), ('dual', 'FIELD=VALUE')],
)
def test_mistakes_in_a_model(model, words, capsys):
  assert main(['step', model]) == 2
  assert words in capsys.readouterr().err
