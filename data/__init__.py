"""Data pipeline: data set -> transform -> loader.

types       what a caller says: Source, Augmentation
registry    the table of data sets: a new one is a row there
build       train_loader, eval_loader, and what they need of a data set: ImageSet
classification, segmentation, detection     a data set as each task takes it
digits, patches, cifar, glyphs, fake        sets that live on the device as one tensor
folder, zipped, shards          images in files
caltech                         one whose split is ours
cityscapes, coco                layouts of images with label images, and with boxes and masks
scenes                          digits in both, made where they are absent
obtain                          what fetches or makes a set that is absent
decode      encoded bytes -> an image
transforms, raug15              one decoded image -> uint8 tensor
gpu_decode, raug15_batched      the same of batches, on the device
sampler     which images in what order, and how far an epoch has got; randomness is that of data.seeding
loader, resident, decoded       batches on the device; samples and unreadable images are decoded's
on_device                       normalize, erase, mix: whole batches
"""

from data.build import ImageSet, eval_loader, train_loader
from data.classification import Classification, describe
from data.detection import Detection
from data.loader import Loader
from data.sampler import SamplerState
from data.segmentation import Segmentation
from data.types import Augmentation, DatasetInfo, Source

__all__ = [
    "Augmentation",
    "Classification",
    "DatasetInfo",
    "Detection",
    "ImageSet",
    "Loader",
    "SamplerState",
    "Segmentation",
    "Source",
    "describe",
    "eval_loader",
    "train_loader",
]
