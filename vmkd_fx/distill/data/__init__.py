"""Images to train and to judge on, as a pure function of (seed, epoch).

The source of truth is a uint8 image of the model's own size. Every tensor follows from it by

    x = (uint8 / 255 - mean) / std        in float32

which a runtime that is fed the same uint8 images repeats bit for bit. What happens to image `i` in epoch `e`
depends on (seed, e, i) and on nothing else: not on the number of processes or of workers, not on where an
epoch was begun. So an epoch can be made again from its number, and a training that was interrupted sees the
images that it would have seen.
"""

from vmkd_fx.distill.data.digits import DIGITS_MEAN, DIGITS_STD, Augmentation, Digits, warp
from vmkd_fx.distill.data.images import Images
from vmkd_fx.distill.data.mixing import Mixing
from vmkd_fx.distill.data.opening import DATASETS, data_names, open_data
from vmkd_fx.distill.data.order import batches_per_epoch, epoch_order, permutation
from vmkd_fx.distill.data.protocol import Batch, ImageData
from vmkd_fx.distill.data.transforms import View

__all__ = [
    "DATASETS",
    "DIGITS_MEAN",
    "DIGITS_STD",
    "Augmentation",
    "Batch",
    "Digits",
    "ImageData",
    "Images",
    "Mixing",
    "View",
    "batches_per_epoch",
    "data_names",
    "epoch_order",
    "open_data",
    "permutation",
    "warp",
]
