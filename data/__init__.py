"""An image's way: data set -> transform -> loader.

types       what a caller says: Source, Augmentation; and gets: Info
build       of classification: describe, train_loader, eval_loader
segmentation, detection         the same of each: describe, train_loader, eval_loader, and the table of its data sets
registry    the table of data sets for classification: a new one is a row there
digits, patches, cifar, glyphs, fake    sets that live on the device as one tensor
encoded, folder, zipped         images in files
caltech                         one whose split is ours
cityscapes, coco                layouts of images with label images, and with boxes and masks
scenes                          digits in both, made where they are absent
generated                       the folder of a set that is made where it is absent
download                        what fetches a set that is absent, once per node
decode      encoded bytes -> an image
transforms, raug15              one decoded image -> uint8 tensor
samplers                        which images in what order; randomness is that of data.seeding
position                        what an epoch has been through: it may stop, and go on with other processes
loader, resident, decoded       batches on the device; samples and unreadable images are decoded's
on_device                       normalise, erase, mix: whole batches
"""

from data import detection, segmentation
from data.build import describe, eval_loader, train_loader
from data.loader import Loader
from data.position import Position
from data.types import Augmentation, Info, Source

__all__ = [
    "Augmentation",
    "Info",
    "Loader",
    "Position",
    "Source",
    "describe",
    "detection",
    "eval_loader",
    "segmentation",
    "train_loader",
]
