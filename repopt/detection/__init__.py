"""Detection: Faster, Mask and Cascade Mask R-CNN, and FCOS, of torchvision's parts on our backbones.

model = create_detector("RepOpt-VGG-B1", mode="target", num_classes=80, head="cascade", mean=..., std=...)
"""

from repopt.detection.backbone import NECKS
from repopt.detection.base import Detector, DetectorOn
from repopt.detection.build import BODY, FCOS, HEADS, WITH_MASKS, create_detector
from repopt.detection.end_to_end import EndToEnd, EndToEndDetector
from repopt.detection.fcos import Fcos
from repopt.detection.parts import Transform

__all__ = [
    "BODY",
    "FCOS",
    "HEADS",
    "NECKS",
    "WITH_MASKS",
    "Detector",
    "DetectorOn",
    "EndToEnd",
    "EndToEndDetector",
    "Fcos",
    "Transform",
    "create_detector",
]
