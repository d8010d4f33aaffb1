"""ST-LPIPS, a perceptual loss and metric whose weights come with a Python package. It is not LPIPS."""

import hashlib
import importlib.resources
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.losses.perceptual import CalibratedDistance, FrozenFeatures

PACKAGE = "stlpips-pytorch 0.0.2"
ST_LPIPS_NAME = f"ST-LPIPS (not LPIPS) with AlexNet, {PACKAGE}"
WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
WEIGHTS_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
LEAST_SIDE = 21  # pixels; the third blur of smaller images has less than 3, too few to mirror


class STLPIPS(CalibratedDistance):
    """ST-LPIPS, shift-tolerant LPIPS, with AlexNet (Ghildyal and Liu, 2022).

    It has the form of LPIPS, with other weights and a network that blurs before it subsamples, so its values are not
    those of LPIPS. Nothing is downloaded: all weights are in the package `stlpips-pytorch`, of which only this file
    is read. As in `LPIPS`, `EPS` stands inside the root.

    Images have at least 21 pixels a side. The module has no parameters and an empty state dict.

    Raises:
        UserError: the package is missing, or its weights are not those of version 0.0.2.
    """

    def __init__(self) -> None:
        weights = load_weights()
        with torch.device("meta"):
            layers = alexnet_layers()
        found = {key.rpartition("net.slice")[2].partition(".")[2]: value for key, value in weights.items()}
        layers.load_state_dict({key: found[key] for key in layers.state_dict()}, assign=True)
        outputs = [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
        super().__init__(FrozenFeatures(layers, outputs), weights)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Returns the mean ST-LPIPS distance, computed in float32 even under autocast.

        Args:
            image, reconstruction: images (N, 3, H, W) in [-1, 1] with H and W at least 21.

        Returns:
            A scalar, the mean over the images. It is zero if they are equal.

        Raises:
            ValueError: the images are smaller.
        """
        if min(image.shape[-2:]) < LEAST_SIDE:
            raise ValueError(
                f"ST-LPIPS needs images of at least {LEAST_SIDE} pixels a side, got {tuple(image.shape)}"
            )
        return super().forward(image, reconstruction)


def load_weights() -> dict[str, Tensor]:
    """Reads the state dict of the package's network.

    Raises:
        UserError: as `STLPIPS`.
    """
    install = "pip install 'litevae[perceptual]'"
    try:
        file = importlib.resources.files("stlpips_pytorch") / WEIGHTS
        content = file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(f"st_lpips needs the package {PACKAGE}, which has its weights: {install}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{file} is not that of {PACKAGE}: its SHA-256 begins with {digest[:8]}, not {WEIGHTS_SHA256[:8]}: "
            f"{install}"
        )
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return weights


class Blur(nn.Module):
    """Blurs features (N, C, H, W) with the filter 1 2 1 along both axes and keeps every second position.

    They are mirrored by 2 positions at the border, which gives (N, C, (H + 3) // 2, (W + 3) // 2).
    """

    def forward(self, features: Tensor) -> Tensor:
        padded = F.pad(features, [2] * 4, mode="reflect")
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2)  # means of means of two: 1 2 1


def alexnet_layers() -> nn.Sequential:
    """Returns the layers of an AlexNet that blurs where the original has strides, up to the last convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, padding=2),
        Blur(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=1),
        Blur(),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=1),
        Blur(),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
    )
