#!/usr/bin/env bash
# Everything that is checked: sets itself up, then lints and tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses auto --dist loadscope "$@"
