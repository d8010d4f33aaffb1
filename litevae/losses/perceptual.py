"""Perceptual losses on VGG's features: LPIPS, and ESRGAN's from before the activation (Appendix D.1)."""

import importlib.resources
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from litevae.files import explaining_weights

# Inside the root of LPIPS's norm, so that a position where all features are 0 has a gradient. lpips adds the
# same number outside of the root.
EPS = 1e-10


class LPIPS(nn.Module):
    """LPIPS 0.1 with VGG16 (Zhang et al., 2018), with the calibration that comes with the `lpips` package.

    Holds no parameters and nothing in its state dict.

    Args:
        pretrained: as in `VGGFeatures`.

    Raises:
        UserError: VGG16's weights are neither there nor to be downloaded.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        # relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3
        self.features = VGGFeatures("vgg16", (3, 8, 15, 22, 29), pretrained)
        # the ImageNet normalisation for images in [-1, 1], as rounded by lpips
        buffers = {
            "shift": torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1),
            "scale": torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1),
        }
        with importlib.resources.as_file(importlib.resources.files("lpips") / "weights/v0.1/vgg.pth") as path:
            calibration = torch.load(path, map_location="cpu", weights_only=True)
        for index in range(len(self.features.taps)):
            buffers[f"calibration{index}"] = calibration[f"lin{index}.model.1.weight"]
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Two (N, 3, H, W) tensors in [-1, 1], H and W at least 16, to a scalar: the mean over the images.

        Float32 whatever autocast does. Zero where the images are equal.
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


def unit_vectors(features: Tensor) -> Tensor:
    """(N, C, H, W) with each position's C features scaled to length 1."""
    return features * (features.square().sum(1, keepdim=True) + EPS).rsqrt()


class ESRGANLoss(nn.Module):
    """mean |φ(x) - φ(x̂)| with φ VGG19's conv5_4 before the activation (Wang et al., 2018, Section 3.3).

    Holds no parameters and nothing in its state dict.

    Args:
        pretrained: as in `VGGFeatures`.

    Raises:
        UserError: VGG19's weights are neither there nor to be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.features = VGGFeatures("vgg19", (34,), pretrained)
        # torchvision's, for images in [0, 1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Two (N, 3, H, W) tensors in [-1, 1], H and W at least 16, to a scalar: the mean over all features.

        Float32 whatever autocast does. Zero where the images are equal.
        """
        with torch.autocast(image.device.type, enabled=False):
            (a,), (b,) = (self.features(self.normalise(x)) for x in (image, reconstruction))
            return F.l1_loss(b, a)

    def normalise(self, image: Tensor) -> Tensor:
        return ((image.to(self.mean.dtype) + 1) / 2 - self.mean) / self.std


class VGGFeatures(nn.Module):
    """torchvision's VGG up to the last of `taps`, frozen.

    The weights are buffers that no state dict holds: constants, which a checkpoint need not carry.

    Args:
        name: of the network.
        taps: indices of the layers, in order, whose output `forward` returns.
        pretrained: ImageNet's weights, which torchvision downloads. False, for tests: random weights, the
            same every time, drawn without the global random state.

    Raises:
        UserError: the weights are neither there nor to be downloaded.
    """

    def __init__(self, name: Literal["vgg16", "vgg19"], taps: Sequence[int], pretrained: bool) -> None:
        super().__init__()
        self.taps = tuple(taps)
        with torch.device("meta"):  # the classifier, most of a VGG's weights, never exists
            network = torchvision.models.get_model(name, weights=None, init_weights=False)
        self.layers: nn.Sequential = network.features[: self.taps[-1] + 1]
        if pretrained:
            load_pretrained(self.layers, name)
        else:
            randomise(self.layers)
        for layer in self.layers:
            for key, parameter in list(layer.named_parameters()):
                delattr(layer, key)
                layer.register_buffer(key, parameter.detach(), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W), normalised as ImageNet's images, to the tapped features, (N, C_i, H_i, W_i) each."""
        outputs = []
        for index, layer in enumerate(self.layers):
            image = layer(image)
            if index in self.taps:
                outputs.append(image)
        return outputs


def load_pretrained(layers: nn.Sequential, name: str) -> None:
    """Gives `layers`, the first of VGG `name`, ImageNet's weights, which are downloaded where need be."""
    source = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    with explaining_weights(source.url, f"torchvision's {name}"):
        weights = source.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
        wanted = {key: weights[f"features.{key}"] for key in layers.state_dict()}
        layers.load_state_dict(wanted, assign=True)


def randomise(layers: nn.Sequential) -> None:
    """Gives `layers` He-initialised weights and no biases, always the same."""
    generator = torch.Generator().manual_seed(0)
    layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
