"""RepOptimizers: plain networks trained as if they were multi-branch ones (arXiv 2205.15242).

model  = repopt.create_model("RepOpt-VGG-B1", mode="target", num_classes=1000)
scales = repopt.load_scales("RepOpt-VGG-B1-scales.pth")
repopt.initialize(model, scales)
optimizer = repopt.build_optimizer("sgd", model, scales, lr=0.1, momentum=0.9, weight_decay=4e-5, nesterov=True)

What the package offers is declared in ``__init__.pyi`` and imported when it is first used: torch and timm take seconds,
and the command line answers without them.
"""

import lazy_loader

from repopt import _with_timm

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_with_timm.watch()
