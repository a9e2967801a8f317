#!/usr/bin/env bash
# Everything that is checked: sets itself up, then lints, checks types and tests. Arguments go to pytest.
# `bash scripts/test.sh fast` lints and runs the tests that most changes need.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ "${1:-}" = fast ]; then
  shift
  set -- --dist load tests/repopt/test_{csla,reparam,families,equivalence,optim,held}.py \
    tests/train/test_{config,command,engine,saving}.py tests/data/test_data_sampler.py "$@"
else
  .venv/bin/mypy
fi
exec .venv/bin/python -m pytest --numprocesses auto --dist loadscope "$@"
