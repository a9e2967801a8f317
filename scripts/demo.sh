#!/usr/bin/env bash
# The method on real images, on a CPU, in minutes: sets itself up, then runs scripts/demo.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec .venv/bin/python scripts/demo.py "$@"
