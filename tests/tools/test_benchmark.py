"""`tools.benchmark input` runs and names every op; no time is asserted."""

import textwrap

import numpy as np
import pytest
import tensorflow as tf

from tools import benchmark

SMALL = ['input', '--images=8', '--rounds=1']


def test_the_usual_lines(capsys):
  assert benchmark.main(SMALL) == 0
  out = capsys.readouterr().out
  for op in ('(tf.data alone)', *'|'.join(benchmark.LINES).split('|')):
    assert f'\n{op} ' in out
  assert '8 synthetic JPEGs of 500 x 375' in out
  assert 'cores feed a chip that takes 2500 images/s' in out


def test_a_config(capsys):
  config = 'configs/proj/dpn/quickstart.py'
  assert benchmark.main([*SMALL, f'--config={config}']) == 0
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
  assert benchmark.main(arguments) == 0
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
  assert benchmark.main([*SMALL, *arguments]) == 2
  assert words in capsys.readouterr().err


def test_synthetic_jpegs_are_as_large_as_photographs():
  files = benchmark.synthetic_jpegs(5)
  assert all(60_000 < len(f) < 110_000 for f in files)
  images = np.stack([tf.io.decode_jpeg(f) for f in files])
  assert images.shape == (5, 375, 500, 3)
  assert 40 < images.std() < 70 and len({f[-99:] for f in files}) == 5
