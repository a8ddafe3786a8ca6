#!/usr/bin/env bash
# Run the tests on other versions than the pinned ones:
#
#   scripts/check_versions.sh floors           # the lowest versions that pyproject.toml allows, Python 3.10
#   scripts/check_versions.sh newest           # the newest versions on the package index, the newest Python
#   scripts/check_versions.sh floors tests/model tests/batch     # only these tests
#
# Each run has a virtual environment under $DIR (default /tmp/ray_zerocopy_versions). A build of torch from PyPI brings
# several GB of CUDA packages along. docs/upgrading.md says which runs passed.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:?"floors or newest"}
shift
dir=${DIR:-/tmp/ray_zerocopy_versions}/$which
mkdir -p "$dir"

case $which in
floors)
  python=${PYTHON:-python3.10}
  # The floors, read from pyproject.toml: "torch>=2.4" becomes "torch==2.4.*".
  "$python" - >"$dir/constraints.txt" <<'PYTHON'
import re

text = open("pyproject.toml").read()
listed = re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)[1]
for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', listed):
    print(f"{name}=={version}.*")
assert "torch" in listed, listed
PYTHON
  ;;
newest)
  python=${PYTHON:-python3.13}
  : >"$dir/constraints.txt"
  ;;
*)
  echo "floors or newest, not $which" >&2
  exit 2
  ;;
esac

[ -x "$dir/venv/bin/python" ] || "$python" -m venv "$dir/venv"
pip="$dir/venv/bin/pip"
# What the tests import, without the pins of the extras: "ray[serve]==2.60.0" becomes "ray[serve]".
sed -nE 's/^.*"([A-Za-z0-9_-]+(\[[a-z]+\])?)==[^"]+".*/\1/p' pyproject.toml >"$dir/packages.txt"
$pip install -q -c "$dir/constraints.txt" -e . -r "$dir/packages.txt"
$pip list 2>/dev/null | grep -iE '^(ray|torch|pyarrow|numpy|transformers) ' | tee "$dir/versions.txt"
"$dir/venv/bin/python" --version | tee -a "$dir/versions.txt"
RAY_AUTH_MODE=disabled "$dir/venv/bin/python" -m pytest -q -n 2 -W default "${@:-tests}"
