#!/usr/bin/env bash
# The docs as a site in site/, to be opened there (site/index.html): broken links and references are errors.
# Arguments go to mkdocs: `bash scripts/docs.sh --site-dir FOLDER`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
export NO_MKDOCS_2_WARNING=1 # the theme advertises its successor
exec .venv/bin/python -m mkdocs build "$@"
