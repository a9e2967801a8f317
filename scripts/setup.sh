# Sourced by the scripts beside it: makes .venv once, and installs a requirements file into it when it is new.
# Usage: source scripts/setup.sh requirements.txt        (PYTHON=python3.12 chooses the interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -e .venv ]; then
  interpreter=${PYTHON:-python3}
  if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    echo "RepOpt needs Python 3.11 or newer; '$interpreter' is not (set PYTHON to one that is)" >&2
    exit 2
  fi
  "$interpreter" -m venv .venv || { rm -rf .venv; exit 2; }
elif ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
  echo "the .venv here is no environment of Python 3.11 or newer with pip: move it away and start again" >&2
  exit 2
fi

stamp=.venv/installed-$1
if ! cat pyproject.toml requirements*.txt | cmp -s - "$stamp"; then
  echo "installing $1 into .venv (once)" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
  cat pyproject.toml requirements*.txt > "$stamp"
fi
