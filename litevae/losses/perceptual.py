"""Perceptual losses on VGG's features: LPIPS, and ESRGAN's on features before the activation (Appendix D.1)."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from litevae.files import explaining_weights

# This is added inside the root of LPIPS's norm, so that a position where all features are 0 has a finite gradient.
# The lpips package adds the same number outside the root.
EPS = 1e-10


class CalibratedDistance(nn.Module):
    """The distance of Zhang et al. (2018), Equation 1: a weighted squared distance of features of unit length.

    The module has no parameters and an empty state dict.

    Args:
        features: network whose features are compared.
        weights: state dict of the `lpips` package, with the weights of the channels of each of the features.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: "FrozenFeatures", weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = features
        # ImageNet's normalisation for images in [-1, 1], rounded as in lpips.
        buffers = {
            "shift": torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1),
            "scale": torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1),
        }
        for index in range(len(self.features.output_indices)):
            buffers[f"calibration{index}"] = weights[f"lin{index}.model.1.weight"]
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Returns the mean distance, computed in float32 even under autocast.

        Args:
            image, reconstruction: images (N, 3, H, W) in [-1, 1] with H and W at least 16.

        Returns:
            A scalar, the mean over the images. It is zero if they are equal.
        """
        with torch.autocast(image.device.type, enabled=False):
            layers = zip(*(self.features(self.normalise(x)) for x in (image, reconstruction)), strict=True)
            distances = [
                F.conv2d((unit_vectors(a) - unit_vectors(b)).square(), self.get_buffer(f"calibration{i}"))
                for i, (a, b) in enumerate(layers)
            ]
            return torch.stack([distance.mean() for distance in distances]).sum()

    def normalise(self, image: Tensor) -> Tensor:
        return (image.to(self.shift.dtype) - self.shift) / self.scale


class LPIPS(CalibratedDistance):
    """LPIPS 0.1 with VGG16 (Zhang et al., 2018), with the calibration of the `lpips` package.

    Args:
        pretrained: whether to load ImageNet's weights, as in `VGGFeatures`.

    Raises:
        UserError: VGG16's weights are missing and cannot be downloaded.
    """

    def __init__(self, pretrained: bool = True) -> None:
        with importlib.resources.as_file(importlib.resources.files("lpips") / "weights/v0.1/vgg.pth") as path:
            calibration = torch.load(path, map_location="cpu", weights_only=True)
        # relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3
        super().__init__(VGGFeatures("vgg16", (3, 8, 15, 22, 29), pretrained), calibration)


def unit_vectors(features: Tensor) -> Tensor:
    """Returns features (N, C, H, W) with the C features of each position scaled to length 1."""
    return features * (features.square().sum(1, keepdim=True) + EPS).rsqrt()


class ESRGANLoss(nn.Module):
    """Mean |φ(x) - φ(x̂)|, where φ is VGG19's conv5_4 before the activation (Wang et al., 2018, Section 3.3).

    The module has no parameters and an empty state dict.

    Args:
        pretrained: whether to load ImageNet's weights, as in `VGGFeatures`.

    Raises:
        UserError: VGG19's weights are missing and cannot be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.features = VGGFeatures("vgg19", (34,), pretrained)
        # torchvision's normalisation, for images in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Returns the mean distance of the features, computed in float32 even under autocast.

        Args:
            image, reconstruction: images (N, 3, H, W) in [-1, 1] with H and W at least 16.

        Returns:
            A scalar, the mean over all features. It is zero if the images are equal.
        """
        with torch.autocast(image.device.type, enabled=False):
            (a,), (b,) = (self.features(self.normalise(x)) for x in (image, reconstruction))
            return F.l1_loss(b, a)

    def normalise(self, image: Tensor) -> Tensor:
        return ((image.to(self.mean.dtype) + 1) / 2 - self.mean) / self.std


class FrozenFeatures(nn.Module):
    """Layers that stand one after the other, some of whose outputs are returned.

    The weights are non-persistent buffers: they are constants, which a checkpoint need not contain.

    Args:
        layers: layers with their weights.
        output_indices: indices of the layers whose output `forward` returns, in ascending order.
    """

    def __init__(self, layers: nn.Sequential, output_indices: Sequence[int]) -> None:
        super().__init__()
        self.layers = layers
        self.output_indices = tuple(output_indices)
        for layer in layers:
            for key, parameter in list(layer.named_parameters()):
                delattr(layer, key)
                layer.register_buffer(key, parameter.detach(), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Returns the chosen features, (N, C_i, H_i, W_i) each.

        Args:
            image: images (N, 3, H, W) with ImageNet's normalisation.
        """
        outputs = []
        for index, layer in enumerate(self.layers):
            image = layer(image)
            if index in self.output_indices:
                outputs.append(image)
        return outputs


class VGGFeatures(FrozenFeatures):
    """The frozen layers of torchvision's VGG up to the last one in `output_indices`.

    Args:
        name: name of the network.
        output_indices: indices of the layers whose output `forward` returns, in ascending order.
        pretrained: whether to load ImageNet's weights, which torchvision downloads. Otherwise, for tests,
            the weights are random but always the same, and do not change the global random state.

    Raises:
        UserError: the weights are missing and cannot be downloaded.
    """

    def __init__(
        self, name: Literal["vgg16", "vgg19"], output_indices: Sequence[int], pretrained: bool
    ) -> None:
        with torch.device("meta"):  # allocates nothing for the classifier, which has most of a VGG's weights
            network = torchvision.models.get_model(name, weights=None, init_weights=False)
        layers: nn.Sequential = network.features[: output_indices[-1] + 1]
        if pretrained:
            load_pretrained(layers, name)
        else:
            randomise(layers)
        super().__init__(layers, output_indices)


def load_pretrained(layers: nn.Sequential, name: str) -> None:
    """Loads ImageNet's weights into `layers`, the first ones of VGG `name`, and downloads them if needed."""
    source = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    with explaining_weights(source.url, f"torchvision's {name}"):
        weights = source.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
        wanted = {key: weights[f"features.{key}"] for key in layers.state_dict()}
        layers.load_state_dict(wanted, assign=True)


def randomise(layers: nn.Sequential) -> None:
    """Fills `layers` with He-initialised weights, always the same, and zero biases."""
    generator = torch.Generator().manual_seed(0)
    layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
