"""The typed configuration of training images."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataConfig:
    """Images to train and to validate on.

    `train` is a folder of images, searched through all its folders; WebDataset shards on local disks, as a
    folder, a file or a pattern such as "train-{000..146}.tar"; a folder that Hugging Face's `save_to_disk`
    has written; .parquet files with a column of images; or "demo", scikit-image's photographs.
    `validation` is another of these; empty, it is the demo's held-out photograph for the demo and none
    otherwise.

    `crop` says how an image becomes a square. random: a square of the shorter side's length at a random
    place, resized (as in the code of Esser et al., arXiv:2012.09841; the paper does not say).
    random_resized: torchvision's RandomResizedCrop, a window of 8 % to 100 % of the image with sides of 3:4
    to 4:3. native: a square of `size` at a random place, not resized; smaller images count as bad.
    """

    train: str = "demo"
    validation: str = ""
    validation_count: int = 64  # images measured on, at most
    size: int = 256  # side of the square crops, in pixels
    batch_size: int = 16  # crops a step, of all processes together
    crop: Literal["random", "random_resized", "native"] = "random"
    flip: bool = True  # mirrors half of the crops
    workers: int = 4  # processes that read images, for each process that trains; 0: none
    max_bad_fraction: float = 0.01  # of the images may be unusable; the run stops at more
