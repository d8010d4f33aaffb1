"""The typed configuration of training images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from litevae.errors import UserError
from litevae.settings import setting

if TYPE_CHECKING:
    from litevae.data.pixels import PixelFormat

MOST_WORKERS = 512  # without a limit, a mistyped number would fill the memory with processes


@dataclass
class DataConfig:
    """Images to train and to validate on.

    `train` is a folder of images, searched recursively; WebDataset shards, given as a folder, a file or a
    pattern such as "train-{000..146}.tar"; a folder that Hugging Face's `save_to_disk` has written; .parquet
    files with a column of images; addresses of shards or .parquet files, such as
    "s3://bucket/train-{000..146}.tar"; or "demo", scikit-image's photographs. `validation` takes the same
    values; if it is empty, the demo is validated on its held-out photograph, and other data on nothing.

    `crop` says how an image becomes a square. random: a square as large as the shorter side, at a random
    place, resized (as in the code of Esser et al., arXiv:2012.09841; the paper does not say).
    random_resized: torchvision's RandomResizedCrop, a window of 8 % to 100 % of the image with an aspect ratio
    of 3:4 to 4:3. native: a square of `size` at a random place, not resized; smaller images count as unusable.
    middle: the largest square in the middle, resized, as `litevae encode` takes it.
    """

    train: str = setting(
        "demo",
        "Training images: a folder, WebDataset shards, a Hugging Face dataset on disk, .parquet files, addresses of "
        "shards or .parquet files (s3://, gs://, hf://, https://), or demo.",
    )
    validation: str = setting(
        "", "Validation images, given like data.train; empty for none, or for the demo's held-out photograph."
    )
    channels: int = setting(
        3,
        "Channels of the images and of the model: 1 (grey), 3 (RGB) or 4 (RGBA, which is not composited on white).",
        minimum=1,
        maximum=4,
    )
    value_range: tuple[float, float] | None = setting(
        None,
        "Stored values that become -1 and 1, such as [0,65535]: images are then .npy, PNG or TIFF files whose values "
        "are not rounded to 8 bits; null for pictures of 8 bits.",
    )
    validation_count: int = setting(64, "Largest number of validation images to measure on.", minimum=1)
    size: int = setting(256, "Side of the square crops, in pixels.", minimum=16)
    batch_size: int = setting(16, "Crops per step, over all processes together.", minimum=1, maximum=10**5)
    crop: Literal["random", "random_resized", "native", "middle"] = setting(
        "random",
        "How crops are taken: the largest square, resized; a random window, resized; unscaled pixels; or the largest "
        "square in the middle, resized.",
    )
    flip: bool = setting(True, "Mirror half of the crops.")
    workers: int = setting(
        4,
        "Processes that read images, per training process; 0 reads in the training process.",
        minimum=0,
        maximum=MOST_WORKERS,
    )
    max_bad_fraction: float = setting(
        0.01, "Fraction of the images that may be unusable; the run stops at more.", minimum=0, below=1
    )

    @property
    def pixel_format(self) -> "PixelFormat":
        """What the images are; `UserError` if `channels` or `value_range` is not allowed."""
        # Imports PyTorch, which `litevae --help` need not wait for.
        from litevae.data.pixels import PixelFormat

        try:
            return PixelFormat(self.channels, self.value_range)
        except ValueError as error:
            raise UserError(f"data.{error}") from None


def check_has_images(config: DataConfig) -> None:
    """Raises UserError if no training images are given."""
    if not config.train:
        raise UserError(
            "data.train is empty: give a folder of images (litevae train --help lists other sources)"
        )
