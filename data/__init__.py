"""An image's way: data set -> transform -> loader.

types       what a caller says: Source, Augmentation; and gets: Info
build       describe, train_loader, eval_loader
registry    the table of data sets: a new one is a row there
digits, patches, cifar, fake    sets that live on the device as one tensor
encoded, folder, zipped         images in files
caltech                         one whose split is ours
download                        what fetches a set that is absent
transforms, raug15              one decoded image -> uint8 tensor
samplers                        which images in what order; randomness is that of repopt.seeding
position                        what an epoch has been through: it may stop, and go on with other processes
loader, resident, decoded       batches on the device; unreadable images are decoded's
on_device                       normalise, erase, mix: whole batches
"""

from data.build import describe, eval_loader, train_loader
from data.loader import Loader
from data.position import Position
from data.types import Augmentation, Info, Source

__all__ = ["Augmentation", "Info", "Loader", "Position", "Source", "describe", "eval_loader", "train_loader"]
