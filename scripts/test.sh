#!/usr/bin/env bash
# Everything that is checked: sets itself up, then lints, checks types and tests. Arguments go to pytest.
# `bash scripts/test.sh fast` lints and runs the tests that most changes need.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ "${1:-}" = fast ]; then
  shift
  set -- tests/repopt/test_{csla,reparam,models,families,equivalence,optim}.py tests/train/test_{config,command,engine,saving}.py \
    tests/data/test_data_{sampler,transforms}.py tests/test_{import_layers,examples}.py "$@"
else
  .venv/bin/mypy
fi
exec .venv/bin/python -m pytest --numprocesses auto --dist loadscope "$@"
