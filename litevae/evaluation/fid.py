"""The Fréchet inception distance of torchmetrics, with checked weights."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from litevae.files import explaining_weights, weights_path

# torch-fidelity's copy of the TensorFlow graph that FID is defined with
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


INCEPTION_NAME = f"Inception of torch-fidelity, {Path(INCEPTION).stem}"


def make_fid(features: nn.Module | None) -> FrechetInceptionDistance:
    """Of Inception's features, or of others; UserError where Inception's weights are not to be had."""
    if features is not None:
        return FrechetInceptionDistance(feature=features)
    path = weights_path(INCEPTION)
    with explaining_weights(INCEPTION, "torch-fidelity's Inception"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        # before it is unpickled, which could run anything
        wanted = path.stem.rpartition("-")[2]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted):
            raise RuntimeError(f"its SHA-256 begins with {found[:8]}, not {wanted}")
        # antialias=False: FID is defined with TensorFlow's plain bilinear resizing
        return FrechetInceptionDistance(
            feature=2048, feature_extractor_weights_path=str(path), antialias=False
        )
