"""What a run on a GPU machine begins with: is all there that it needs, and what machine is it?

    python scripts/gpu_machine.py DEVICE MODULE=PACKAGE...

Prints members of a JSON object: the machine, torch's version, and the time. What is missing is one line, exit code 2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import UTC, datetime

import _root  # noqa: F401

from repopt.errors import UserError
from train.command import run_command


def main(device: str, needed: list[str]) -> None:
    """Print it.

    Args:
        device: "cuda" or "cpu".
        needed: modules and the packages that have them, as MODULE=PACKAGE.

    Raises:
        UserError: a module or the GPU is not there.
    """
    packages = dict(pair.split("=") for pair in needed)
    if missing := [package for module, package in packages.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"{' '.join(missing)} missing here: put the wheels into .whl (scripts/gpu_common.sh says how)")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here (DEVICE=cpu TINY=1 tries the script without)")
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    found = {"machine": machine, "torch": torch.__version__, "run": now}
    print(json.dumps(found)[1:-1])


if __name__ == "__main__":
    sys.exit(run_command("gpu_machine.py", lambda: main(sys.argv[1], sys.argv[2:])))
