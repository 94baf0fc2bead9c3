"""Tests of tools/run.sh, without a network.

Every test has a small repository of its own with a copy of the script. The
network's part is played by a `pip` on PYTHONPATH that notes its calls, but in
`test_a_first_run_from_nothing`, where pip itself reads a folder of wheels.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

_SCRIPT = pathlib.Path(__file__).parents[2] / 'tools' / 'run.sh'

# A module that tells how it was called, and ends as it is told.
_ECHO = """
import json, os, sys
print(json.dumps([os.getcwd(), *sys.argv[1:]]))
sys.exit(int(os.environ.get('ECHO_EXIT', 0)))
"""

# All that the script may count on, besides a Python.
_COMMANDS = 'bash cat dirname find head ls mkdir mv rm'

# Environments without pip take no time to make; the tests bring their own.
_PYTHON = """
case "$1 $2" in '-m venv') shift 2; set -- -m venv --without-pip "$@" ;; esac
exec REAL "$@"
"""

_PIP = """
import os, sys, time
if 'install' in sys.argv:
  with open(os.environ['PIP_CALLS'], 'a') as f:
    print(*sys.argv[1:], file=f)
  print('the words of pip')
  while os.path.exists(os.environ.get('PIP_HOLD', '')):
    time.sleep(0.05)
  sys.exit(int(os.environ.get('PIP_EXIT', 0)))
"""


def _executable(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


class _World:
  """A repository, a PATH with only what the script may count on, a pip."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / 'a repository'
    self.venv = self.root / '.venv'
    self.stamp = self.venv / 'dpn_installed'
    self.bin = folder / 'bin'
    self.calls = folder / 'pip_calls'
    self.calls.touch()
    (self.root / 'tools').mkdir(parents=True)
    shutil.copy(_SCRIPT, self.root / 'tools')
    (self.root / 'requirements.txt').write_text('jax\n')
    (self.root / 'pyproject.toml').write_text('[project]\n')
    (self.root / 'echo.py').write_text(_ECHO)
    _executable(folder / 'pip' / 'pip' / '__main__.py', _PIP)
    (folder / 'pip' / 'pip' / '__init__.py').touch()
    self.bin.mkdir()
    for name in _COMMANDS.split():
      (self.bin / name).symlink_to(shutil.which(name))
    self.add_python('python3')
    self.env = {
      'DPN_JAX': 'cpu',
      'HOME': str(folder),
      'PATH': str(self.bin),
      'PIP_CALLS': str(self.calls),
      'PYTHONPATH': str(folder / 'pip'),
    }

  def add_python(self, name: str, text: str = _PYTHON):
    real = os.path.realpath(sys.executable)
    _executable(self.bin / name, '#!/bin/sh\n' + text.replace('REAL', real))

  def add_nvidia(self, driver: str, capability: str):
    """An nvidia-smi; an old one does not know the compute capability."""
    old = float(driver.split('.')[0]) < 510
    _executable(
      self.bin / 'nvidia-smi',
      f"""#!/usr/bin/env bash
      case "$*" in
        *compute_cap*)
          {'echo Field is not a valid field to query && exit 2' if old else ''}
          printf '{driver}, {capability}\\n{driver}, {capability}\\n' ;;
        *) printf '{driver}\\n{driver}\\n' ;;
      esac
      """,
    )
    del self.env['DPN_JAX']

  def make_venv(self):
    """Makes an environment without pip, which takes no time."""
    subprocess.run([self.bin / 'python3', '-m', 'venv', self.venv], check=True)

  def start(self, *args: str, cwd=None, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
      ['bash', self.root / 'tools' / 'run.sh', *args],
      cwd=cwd or self.root,
      env=self.env | env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def run(self, *args: str, **kw) -> subprocess.CompletedProcess:
    process = self.start(*args, **kw)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(args, process.returncode, out, err)

  def installs(self) -> list[str]:
    return self.calls.read_text().splitlines()

  def wait_for_pip(self):
    for _ in range(2000):
      if self.installs():
        return
      time.sleep(0.05)
    raise AssertionError('pip was not called')


@pytest.fixture
def world(tmp_path) -> _World:
  return _World(tmp_path)


@pytest.fixture
def ready(world) -> _World:
  """A world whose environment is installed."""
  world.make_venv()
  done = world.run('echo')
  assert done.returncode == 0, done.stderr
  world.calls.write_text('')
  return world


@pytest.mark.parametrize('args', [(), ('--workdir', 'x')])
def test_no_module_prints_the_usage(world, args):
  done = world.run(*args)
  assert done.returncode == 2
  assert done.stderr.startswith('usage: bash tools/run.sh MODULE')
  assert not world.venv.exists()


def test_help_is_no_error(world):
  done = world.run('--help')
  assert done.returncode == 0
  assert done.stdout.startswith('usage: bash tools/run.sh MODULE')


def test_arguments_and_exit_code_pass_through(ready, tmp_path):
  args = ['a b', '', '"quoted" \'too\'', '--x=$HOME', '*', '-c', 'new\nline']
  done = ready.run('echo', *args, cwd=tmp_path, ECHO_EXIT='7')
  assert done.returncode == 7
  assert done.stderr == ''
  assert json.loads(done.stdout) == [str(tmp_path), *args]
  assert ready.installs() == []


def test_dpn_venv_moves_the_environment(ready, tmp_path):
  ready.venv.rename(tmp_path / 'elsewhere')
  done = ready.run('echo', cwd=tmp_path, DPN_VENV='elsewhere')
  assert done.returncode == 0, done.stderr
  assert not ready.venv.exists()


@pytest.mark.parametrize('name', ['requirements.txt', 'pyproject.toml'])
def test_a_change_installs_once_more(ready, name):
  with open(ready.root / name, 'a') as f:
    f.write('# changed\n')
  for _ in range(2):
    done = ready.run('echo')
    assert done.returncode == 0, done.stderr
  assert [call.split()[-3:] for call in ready.installs()] == [
    ['-e', '.[test]', 'jax']
  ]


def test_another_place_installs_once_more(ready):
  # As the project is installed editable, by its path.
  ready.root = ready.root.rename(ready.root.with_name('moved'))
  done = ready.run('echo')
  assert done.returncode == 0, done.stderr
  assert len(ready.installs()) == 1


def test_a_failed_installation_is_loud_and_leaves_no_stamp(world):
  world.make_venv()
  done = world.run('echo', PIP_EXIT='1')
  assert done.returncode == 1
  assert 'the words of pip' in done.stderr
  assert 'run.sh: pip failed' in done.stderr
  assert done.stdout == ''
  assert not world.stamp.exists()
  assert world.run('echo').returncode == 0
  assert len(world.installs()) == 2


def test_concurrent_first_runs_install_once(world, tmp_path):
  world.make_venv()
  hold = tmp_path / 'hold'
  hold.touch()
  runs = [world.start('echo', PIP_HOLD=str(hold))]
  world.wait_for_pip()
  runs += [world.start('echo', str(i)) for i in range(3)]
  for run in runs[1:]:
    assert 'waiting' in run.stderr.readline()
  hold.unlink()
  ends = [run.communicate(timeout=300) for run in runs]
  assert [run.returncode for run in runs] == [0] * 4, ends
  assert len(world.installs()) == 1


def test_the_lock_is_not_held_while_the_module_runs(world):
  world.make_venv()
  module = world.start('timeit', '-n1', '-r1', 'import time; time.sleep(60)')
  try:
    world.wait_for_pip()
    done = world.run('echo', PIP_CALLS=os.devnull, DPN_JAX='tpu')
    assert done.returncode == 0, done.stderr
    assert module.poll() is None
  finally:
    os.killpg(module.pid, signal.SIGKILL)
    module.communicate()


def test_a_killed_installation_starts_anew(world, tmp_path):
  world.make_venv()
  (world.venv / 'half_a_package').touch()
  first = world.start('echo', PIP_HOLD=str(tmp_path))
  world.wait_for_pip()
  os.killpg(first.pid, signal.SIGKILL)
  first.communicate()
  done = world.run('echo')
  assert done.returncode == 0, done.stderr
  assert 'run.sh: making .venv with python3' in done.stderr
  assert not (world.venv / 'half_a_package').exists()
  assert len(world.installs()) == 2


def test_an_environment_whose_python_is_gone_is_made_anew(ready):
  (ready.venv / 'bin' / 'python').unlink()
  (ready.venv / 'bin' / 'python').symlink_to('/no/such/python')
  done = ready.run('echo')
  assert done.returncode == 0, done.stderr
  assert 'run.sh: making .venv with python3' in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(world, tmp_path):
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'chapter1').touch()
  done = world.run('echo', DPN_VENV=str(tmp_path / 'thesis'))
  assert done.returncode == 1
  assert 'DPN_VENV' in done.stderr
  assert os.listdir(tmp_path / 'thesis') == ['chapter1']


def test_no_usable_python_says_what_was_found(world):
  world.add_python('python3', 'echo 3.9\n')
  world.add_python('python3.12', 'echo not found >&2; exit 127\n')
  done = world.run('echo')
  assert done.returncode == 1
  assert 'needs Python 3.11, 3.12 or 3.13' in done.stderr
  assert 'python3 (3.9), python3.12 (fails)' in done.stderr
  assert not world.venv.exists()


def test_a_python_without_venv_says_what_to_install(world):
  world.add_python(
    'python3',
    """
    case "$2" in *ensurepip*) exit 1;; *) echo 3.12;; esac
    """,
  )
  done = world.run('echo')
  assert done.returncode == 1
  assert 'apt-get install python3.12-venv' in done.stderr


def test_a_python3_that_is_too_old_gives_way(world):
  world.add_python('python3', 'echo 3.10\n')
  world.add_python('python3.11')
  done = world.run('echo', PIP_EXIT='1')
  assert 'run.sh: making .venv with python3.11' in done.stderr


@pytest.mark.parametrize(
  'driver,capability,jax',
  [
    ('580.65.06', '9.0', 'jax[cuda13]'),
    ('600.1', '12.0', 'jax[cuda13]'),
    ('580.65.06', '7.0', 'jax[cuda12]'),  # V100: CUDA 13 has dropped it
    ('550.54.15', '8.0', 'jax[cuda12]'),
    ('525.60.13', '8.0', 'jax[cuda12]'),
  ],
)
def test_an_nvidia_driver_chooses_its_cuda(world, driver, capability, jax):
  world.make_venv()
  world.add_nvidia(driver, capability)
  done = world.run('echo')
  assert done.returncode == 0, done.stderr
  assert f'installing the project with {jax} ' in done.stderr
  assert world.installs()[0].split()[-1] == jax


def test_an_old_nvidia_driver_is_an_error(ready):
  ready.add_nvidia('470.57.02', '8.0')
  done = ready.run('echo')
  assert done.returncode == 1
  assert 'NVIDIA driver 470.57.02 is too old' in done.stderr
  assert ready.run('echo', DPN_JAX='cpu').returncode == 0


def test_another_cuda_makes_the_environment_anew(ready):
  assert ready.run('echo', DPN_JAX='cuda12').returncode == 0
  (ready.venv / 'cuda12_plugin').touch()
  done = ready.run('echo', DPN_JAX='cuda13')
  assert done.returncode == 0, done.stderr
  assert not (ready.venv / 'cuda12_plugin').exists()


@pytest.mark.slow
def test_an_activated_environment_can_be_made_anew(ready):
  path = f'{ready.venv}/bin:{ready.bin}'
  done = ready.run('echo', PATH=path)
  assert done.stderr == ''
  ready.stamp.write_text('unfinished\n')
  done = ready.run('echo', PATH=path)
  assert done.returncode == 0, done.stderr
  assert 'run.sh: making .venv with ' in done.stderr


def test_without_an_accelerator_the_nodes_environment_will_do(ready):
  del ready.env['DPN_JAX']
  assert ready.run('echo', DPN_JAX='cuda13').returncode == 0
  assert ready.run('echo').returncode == 0
  assert len(ready.installs()) == 1


def test_a_mistyped_dpn_jax_is_an_error(world):
  done = world.run('echo', DPN_JAX='gpu')
  assert done.returncode == 1
  assert 'cpu, cuda12, cuda13 or tpu' in done.stderr


def test_tpus_are_known_as_jax_knows_them(ready):
  hardware_utils = pytest.importorskip('jax._src.hardware_utils')
  text = _SCRIPT.read_text()
  missing = [i for i in hardware_utils._TPU_PCI_DEVICE_IDS if i not in text]
  assert missing == []
  chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
  del ready.env['DPN_JAX']
  assert ready.run('echo').returncode == 0
  assert ready.installs() == (['jax[tpu]'] if chips else [])


def _wheel(folder: pathlib.Path, name: str, extra: str = ''):
  info = f'{name}-1.0.dist-info'
  with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as z:
    z.writestr(f'{name}.py', 'print("jax was imported")\n')
    z.writestr(
      f'{info}/METADATA',
      f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{extra}',
    )
    z.writestr(
      f'{info}/WHEEL',
      'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    )
    z.writestr(f'{info}/RECORD', '')


# A build backend that needs no setuptools: PEP 517 and 660 in their least.
_BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
  name = 'toy-1.0-py3-none-any.whl'
  info = 'toy-1.0.dist-info/'
  with zipfile.ZipFile(pathlib.Path(folder, name), 'w') as z:
    z.writestr('toy.pth', str(pathlib.Path.cwd() / 'src'))
    z.writestr(info + 'METADATA', '''Metadata-Version: 2.1
Name: toy
Version: 1.0
Requires-Dist: jax
Provides-Extra: test
''')
    z.writestr(info + 'WHEEL', '''Wheel-Version: 1.0
Root-Is-Purelib: true
Tag: py3-none-any
''')
    z.writestr(info + 'RECORD', '')
  return name
"""


@pytest.mark.slow
def test_a_first_run_from_nothing(world, tmp_path):
  pytest.importorskip('ensurepip')
  (world.root / 'pyproject.toml').write_text(
    '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
    'backend-path = ["."]\n[project]\nname = "toy"\nversion = "1.0"\n'
  )
  (world.root / 'backend.py').write_text(_BACKEND)
  (world.root / 'src').mkdir()
  (world.root / 'src' / 'toy.py').write_text('import jax\n')
  (tmp_path / 'wheels').mkdir()
  del world.env['PYTHONPATH']
  world.add_python('python3', 'exec REAL "$@"')
  env = {
    'PIP_CONFIG_FILE': os.devnull,
    'PIP_NO_INDEX': '1',
    'PIP_FIND_LINKS': str(tmp_path / 'wheels'),
    'DPN_JAX': 'tpu',
  }

  done = world.run('toy', **env)  # there is no jax to be had
  assert done.returncode == 1
  assert 'No matching distribution found for jax' in done.stderr
  assert not world.stamp.exists()

  _wheel(tmp_path / 'wheels', 'libtpu')
  _wheel(
    tmp_path / 'wheels',
    'jax',
    'Provides-Extra: tpu\nRequires-Dist: libtpu; extra == "tpu"\n',
  )
  done = world.run('toy', cwd=tmp_path, **env)
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'jax was imported\n'
  assert done.stderr.splitlines() == [
    'run.sh: installing the project with jax[tpu] into a repository/.venv;'
    ' the first time takes minutes'
  ]
  assert world.run('libtpu', **env).returncode == 0
