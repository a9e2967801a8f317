#!/usr/bin/env bash
# Injects faults into trainings and prints what came of them; see scripts/soak.py, to which arguments go.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
exec .venv/bin/python scripts/soak.py "$@"
