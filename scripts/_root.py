"""Imported first by every script: makes the repository importable, wherever the script is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
