"""Training data: the demo's photographs, and random crops of photographs."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litevae.errors import UserError
from litevae.images import Pixels

# Real colour photographs that lie inside the scikit-image wheel, so that nothing is downloaded.
TRAINING_PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "rocket",
    "motorcycle_left",
    "motorcycle_right",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)
HELD_OUT_PHOTOGRAPH = "chelsea"


def load_photograph(name: str) -> Pixels:
    """A photograph of `skimage.data` by its function's name, or motorcycle_left / motorcycle_right."""
    from skimage import data  # slow to import, and only the demo needs it

    if name.startswith("motorcycle_"):
        return data.stereo_motorcycle()[name == "motorcycle_right"]
    return getattr(data, name)()


class RandomCrops(Dataset[Tensor]):
    """Square crops at random places of random photographs, half of them mirrored.

    Item i depends on `seed` and i alone: the same from run to run, however many workers or processes share
    the work, and wherever a run begins.

    Args:
        photographs: (H, W, 3) uint8, kept in memory.
        size: side of the crops in pixels.
        length: number of items.
        seed: of the crops.

    Raises:
        UserError: a photograph smaller than a crop.
    """

    def __init__(self, photographs: Sequence[Pixels], size: int, length: int, seed: int) -> None:
        smallest = min(min(photograph.shape[:2]) for photograph in photographs)
        if size > smallest:
            raise UserError(f"crops of {size} pixels do not fit photographs of {smallest} pixels")
        self.photographs = photographs
        self.size = size
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """(3, size, size) uint8."""
        random = np.random.default_rng((self.seed, index))
        photograph = self.photographs[int(random.integers(len(self.photographs)))]
        height, width = photograph.shape[:2]
        top = random.integers(height - self.size + 1)
        left = random.integers(width - self.size + 1)
        crop = photograph[top : top + self.size, left : left + self.size]
        if random.integers(2):
            crop = crop[:, ::-1]
        return torch.from_numpy(crop.transpose(2, 0, 1).copy())
