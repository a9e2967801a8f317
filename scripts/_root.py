"""Imported first by the scripts beside it: makes the repository importable, wherever they are started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
