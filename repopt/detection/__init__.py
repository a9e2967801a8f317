"""Detection of objects and their masks: Faster, Mask and Cascade Mask R-CNN of torchvision's parts on our backbones.

    model = create_detector("RepOpt-VGG-B1", mode="target", num_classes=80, head="cascade", mean=..., std=...)

Its evaluation needs an extra: requirements-downstream.txt.
"""

from repopt.detection.backbone import NECKS
from repopt.detection.build import BODY, HEADS, WITH_MASKS, Detector, create_detector
from repopt.detection.evaluate import Detection, evaluate

__all__ = ["BODY", "HEADS", "NECKS", "WITH_MASKS", "Detection", "Detector", "create_detector", "evaluate"]
