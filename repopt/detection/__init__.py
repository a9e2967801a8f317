"""Detection of objects and their masks: Faster, Mask and Cascade Mask R-CNN of torchvision's parts on our backbones.

model = create_detector("RepOpt-VGG-B1", mode="target", num_classes=80, head="cascade", mean=..., std=...)
"""

from repopt.detection.backbone import NECKS
from repopt.detection.build import BODY, HEADS, WITH_MASKS, Detector, create_detector

__all__ = ["BODY", "HEADS", "NECKS", "WITH_MASKS", "Detector", "create_detector"]
