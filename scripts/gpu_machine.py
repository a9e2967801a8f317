"""What a run on a GPU machine begins with: is all there that it needs, and what machine is it?

    python scripts/gpu_machine.py DEVICE MODULE[=PACKAGE]...

Prints members of a JSON object: the machine, torch's version, and the time. What is missing is one line, exit code 2;
so nothing is imported here before it is known to be there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import UTC, datetime


def main(device: str, *needed: str) -> str | None:
    """Print what machine it is, or return what is wrong.

    Args:
        device: "cuda" or "cpu".
        needed: modules, as MODULE=PACKAGE where the package has another name.
    """
    packages = (pair.partition("=")[::2] for pair in needed)
    if missing := [package or module for module, package in packages if importlib.util.find_spec(module) is None]:
        return f"{' '.join(missing)} missing here: put the wheels into .whl (scripts/gpu_common.sh says how)"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU here (DEVICE=cpu TINY=1 tries the script without)"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    print(json.dumps({"machine": machine, "torch": torch.__version__, "run": now})[1:-1])
    return None


if __name__ == "__main__":
    if wrong := main(*sys.argv[1:]):
        print(f"gpu_machine.py: {wrong}", file=sys.stderr)
        sys.exit(2)
