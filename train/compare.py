"""One network by every way to INT8 that needs no training, side by side (scripts/quantize.py --method compare)."""

from __future__ import annotations

from repopt import export, quantization
from train import pretrained, run_record
from train.calibration import Trained, new_folder, publish, with_settings
from train.checkpoint import RunFolder
from train.distributed import run_on_main
from train.file_names import ARTIFACTS, COLUMNS
from train.tasks.base import Task
from train.ways import WAYS


def compare(task: Task, folder: RunFolder) -> bool:
    """Quantize after training by all `WAYS`, and write what evaluations find; return that it came to its end."""
    artifacts = folder.path / ARTIFACTS
    run_on_main(lambda: export.refuse_existing(artifacts))
    run_record.write(task, folder)
    trained = Trained(task, pretrained.read(task, task.cfg.MODEL.RESUME))
    forms = {"fp32": trained.in_float()}
    for name, settings in WAYS.items():
        _, observed, prepared = trained.prepare(with_settings(task, {"QUANT.METHOD": "ptq"} | dict(settings)))
        forms[name] = trained.in_int8(name, observed, quantization.convert(prepared))
    run_on_main(lambda: publish(new_folder(artifacts), artifacts, COLUMNS[task.cfg.TASK], forms))
    return True
