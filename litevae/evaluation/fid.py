"""The Fréchet inception distance of torchmetrics, with checked weights."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from litevae.files import explaining_weights, weights_path

# torch-fidelity's port of the TensorFlow graph that defines FID
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


INCEPTION_NAME = f"Inception of torch-fidelity, {Path(INCEPTION).stem}"


def make_fid(features: nn.Module | None) -> FrechetInceptionDistance:
    """Returns the Fréchet distance on Inception's features, or on those of another network.

    Args:
        features: network that replaces Inception, (N, 3, H, W) uint8 to (N, C); None for Inception.

    Raises:
        UserError: Inception's weights are missing and cannot be downloaded, or are damaged.
    """
    if features is not None:
        return FrechetInceptionDistance(feature=features)
    path = weights_path(INCEPTION)
    with explaining_weights(INCEPTION, "torch-fidelity's Inception"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        # Checked before it is unpickled, because unpickling can run any code.
        wanted = path.stem.rpartition("-")[2]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted):
            raise RuntimeError(f"its SHA-256 begins with {found[:8]}, not {wanted}")
        # antialias=False: FID's definition uses TensorFlow's plain bilinear resizing.
        return FrechetInceptionDistance(
            feature=2048, feature_extractor_weights_path=str(path), antialias=False
        )


def share_features(fid: FrechetInceptionDistance) -> FrechetInceptionDistance:
    """Returns another Fréchet distance, without any images yet, on the same network."""
    return FrechetInceptionDistance(feature=SameFeatures(fid.inception, len(fid.real_features_sum)))


class SameFeatures(nn.Module):
    """Calls a network that another module owns, so that it is neither copied nor moved twice."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.call = (network,)  # a tuple is not registered

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.call[0](images)
        return features
