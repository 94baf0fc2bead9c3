#!/usr/bin/env bash
# Runs a module in an environment that is made by the first run: see `usage`.
#
# Written for bash 3.2 (macOS), and for every worker of a pod at once: the
# first one installs, the others of its filesystem wait.
set -euo pipefail

usage='usage: bash tools/run.sh MODULE [ARGS...]

Runs python -m MODULE ARGS... in a virtual environment with this project, its
dependencies and the jax of this machine. Only the first run installs, and one
after a change of requirements.txt, pyproject.toml or the kind of machine.

  bash tools/run.sh big_vision_dpn.train \
    --config configs/proj/dpn/quickstart.py --workdir workdirs/quickstart
  bash tools/run.sh pytest

Needs Python 3.11, 3.12 or 3.13 on PATH. Relative paths in ARGS are relative to
the current folder.

  DPN_VENV  folder of the environment (default: .venv in the repository); give
            each kind of machine its own where they share a filesystem
  DPN_JAX   cpu, cuda12, cuda13 or tpu (default: what this machine has), for
            example to build a container image where there is no GPU'

say() { echo "run.sh: $*" >&2; }
die() {
  say "$*"
  exit 1
}

if [ $# -eq 0 ]; then
  echo "$usage" >&2
  exit 2
fi
case $1 in
  -h | --help) echo "$usage" && exit ;;
  -*) echo "$usage" >&2 && exit 2 ;;
esac

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DPN_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
shown=${venv#"$PWD/"}
python=$venv/bin/python
stamp=$venv/dpn_installed
lock=$venv/dpn_lock

# Prints driver version and compute capability, a line a GPU.
ask_nvidia() {
  local fields answer
  # The second time without compute_cap, which an old driver does not know.
  for fields in driver_version,compute_cap driver_version; do
    answer=$(nvidia-smi --query-gpu="$fields" --format=csv,noheader \
      2>/dev/null) || continue
    echo "$answer"
    return
  done
  return 1
}

# Prints the jax that pip must install to use this machine.
jax_of_this_machine() {
  case ${DPN_JAX:-} in
    '') ;;
    cpu) echo jax && return ;;
    cuda12 | cuda13 | tpu) echo "jax[$DPN_JAX]" && return ;;
    *) die "DPN_JAX is '$DPN_JAX'; it must be cpu, cuda12, cuda13 or tpu" ;;
  esac
  local gpus driver device vendor id
  gpus=$(ask_nvidia) || gpus=
  if [[ $gpus =~ ^([0-9]+)\.[0-9.]+ ]]; then
    driver=${BASH_REMATCH[1]}
    if ((driver < 525)); then
      die "NVIDIA driver ${BASH_REMATCH[0]} is too old for jax: update it to" \
        '525 or later (580 for CUDA 13), or set DPN_JAX=cpu'
    fi
    # CUDA 13 needs driver 580, and a GPU of compute capability 7.5 (Turing).
    if ((driver < 580)) || [[ $gpus =~ ,\ ([1-6]\.|7\.[0-4]) ]]; then
      echo 'jax[cuda12]' && return
    fi
    echo 'jax[cuda13]' && return
  fi
  if [ -e /dev/nvidiactl ]; then
    say 'an NVIDIA device is here, but nvidia-smi does not answer: no GPU'
  fi
  # Google's PCI devices are TPUs, disks and network cards. The table is that by
  # which jax knows its chips (jax/_src/hardware_utils.py).
  for device in /sys/bus/pci/devices/*; do
    read -r vendor 2>/dev/null <"$device/vendor" || continue
    [ "$vendor" = 0x1ae0 ] || continue
    read -r id <"$device/device"
    case $id in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076 | 0x007c | \
        0x0083) echo 'jax[tpu]' && return ;;
    esac
  done
  echo jax
}

runs() { "$1" -c '' 2>/dev/null; }

# Prints a Python that can make the environment.
find_python() {
  local candidate answer version base found='' without_venv=''
  # The version, and of a virtual environment's Python that which it is made
  # from: the environment may be the activated one that is to be made anew.
  local question='import sys
print("%d.%d" % sys.version_info[:2],
      sys._base_executable if sys.prefix != sys.base_prefix else "")'
  for candidate in python3 python3.12 python3.11 python3.13; do
    command -v "$candidate" >/dev/null || continue
    # Not every candidate runs: pyenv has shims without a Python behind them.
    answer=$("$candidate" -c "$question" 2>/dev/null) || answer=fails
    read -r version base <<<"$answer"
    found+=", $candidate ($version)"
    [[ $version =~ ^3\.1[123]$ ]] || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "${base:-$candidate}"
      return
    fi
    without_venv=${without_venv:-$version}
  done
  if [ -n "$without_venv" ]; then
    die "Python $without_venv is here without its venv module; on Debian and" \
      "Ubuntu: sudo apt-get install python$without_venv-venv"
  fi
  found=${found#, }
  die "needs Python 3.11, 3.12 or 3.13 on PATH; found: ${found:-none}." \
    'Install one; on Ubuntu 22.04: sudo apt-get install python3.11-venv'
}

# Prints what the environment is made of; a finished one holds it as its stamp.
# The root is in it because the project is installed editable.
recipe() {
  echo "$jax"
  "$python" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' \
    2>/dev/null || return
  echo "$root"
  cat "$root/requirements.txt" "$root/pyproject.toml"
}

# Prints the jax that the environment was made for, or "unfinished".
made_for() { head -n 1 "$stamp" 2>/dev/null || true; }

is_ready() {
  # A login node without an accelerator shares what the other nodes installed.
  if [ "$jax" = jax ] && [ -z "${DPN_JAX:-}" ]; then
    case $(made_for) in 'jax['*) jax=$(made_for) ;; esac
  fi
  [ -f "$stamp" ] && [ "$(recipe)" = "$(cat "$stamp")" ]
}

# Takes the lock, which is released with file descriptor 9: by this script or
# by the kernel, however the script ends. flock(1) is not on macOS.
take_lock() {
  exec 9>>"$lock"
  "$1" -c '
import fcntl, sys
try:
  fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
  print("run.sh: waiting for the run.sh that is installing", file=sys.stderr)
  fcntl.flock(9, fcntl.LOCK_EX)
' || die "cannot lock $lock; set DPN_VENV to a folder on a local disk"
}

must_start_anew() {
  runs "$python" || return 0
  case $(made_for) in
    # Cut off: half a package may be there that pip believes whole.
    unfinished) return 0 ;;
    # The plugins of two accelerators, or of two CUDAs, do not mix.
    'jax['*) [ "$jax" != jax ] && [ "$jax" != "$(made_for)" ] ;;
    *) return 1 ;;
  esac
}

make_venv() {
  local maker
  maker=$(find_python)
  if [ -e "$venv/pyvenv.cfg" ]; then
    # Not `venv --clear`: the lock must outlive it.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name "${lock##*/}" \
      -exec rm -rf {} +
  fi
  echo unfinished >"$stamp"
  say "making $shown with $maker"
  "$maker" -m venv "$venv" >&2
}

run_pip() {
  local pip=("$python" -m pip --disable-pip-version-check --no-input)
  # An environment made by other hands may have no pip.
  "${pip[@]}" --version || "$python" -m ensurepip || return
  # PIP_USER: some machines make `--user` the default, which fails here.
  cd "$root" && PIP_USER=0 "${pip[@]}" install --progress-bar off \
    -e '.[test]' "$jax"
}

install() {
  local log=$venv/dpn_install.log name=$jax
  [ "$jax" != jax ] || name='jax (CPU)'
  echo unfinished >"$stamp"
  # A pip that is interrupted exits as one that failed: tell them apart.
  trap 'exit 130' INT
  say "installing the project with $name into $shown; the first time takes" \
    'minutes'
  if ! (run_pip) >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$stamp"
    die 'pip failed: its output is above'
  fi
  recipe >"$stamp.new"
  mv "$stamp.new" "$stamp"
  trap - INT
}

make_environment() {
  local locker=$python
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ] &&
    [ ! -x "$python" ] && [ ! -e "$lock" ]; then
    die "$venv holds something else than a virtual environment: set DPN_VENV" \
      'to another folder'
  fi
  runs "$python" || locker=$(find_python)
  mkdir -p "$venv"
  take_lock "$locker"
  if ! is_ready; then # else another run.sh has made it meanwhile
    if must_start_anew; then make_venv; fi
    install
  fi
  exec 9>&- # else the lock would last as long as the module runs
}

jax=$(jax_of_this_machine)
if ! is_ready; then make_environment; fi
# The tools of the repository, too, run from any folder.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m "$@"
