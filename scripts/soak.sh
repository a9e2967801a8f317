#!/usr/bin/env bash
# Injects faults into trainings, prints what came of them, and keeps it in benchmarks/soak.json.
#   bash scripts/soak.sh                  all rounds; tens of minutes on 2 cores
#   bash scripts/soak.sh --quick          one round of each; nothing is kept
#   bash scripts/soak.sh "kill -9"        one fault
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
exec .venv/bin/python -m pytest tests/soak -m soak --numprocesses 2 --faults "$@"
