"""The imbalance of the decoder's last feature maps (Section 4.2, Figure 3)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from litevae.data.pixels import Pixels, to_picture
from litevae.errors import UserError
from litevae.evaluation.reconstruction import encode
from litevae.models.interface import Autoencoder
from litevae.plotting import DPI

Magnitude = npt.NDArray[np.float64]  # (h, w)
Array = TypeVar("Array", Magnitude, Pixels)
STRONGEST = 99.9  # percentile


@torch.inference_mode()
def feature_magnitude(model: Autoencoder, image: Pixels) -> Magnitude:
    """Returns the magnitude of the features at each pixel: their root mean square over the channels.

    The features are the output of the decoder's last block, before the output normalisation and convolution, for
    the mode of the image's posterior.

    Args:
        model: LiteVAE or `AutoencoderKL` without tiling; it runs on its own device and in its own dtype.
        image: (H, W, C) pixels, as `encode` takes them.

    Returns:
        The magnitudes (h, w), of the size of the image padded as in `encode`; half of it per side with wavelet
        output.

    Raises:
        UserError: the model does not take this size, or the features are not finite.
    """
    captured: list[Tensor] = []
    latent = encode(model, image)
    handle = model.decoder.up_blocks[-1].register_forward_hook(
        lambda _module, _inputs, output: captured.append(output)
    )
    try:
        model.decode(latent)
    finally:
        handle.remove()
    (features,) = captured
    magnitude = features[0].double().square().mean(dim=0).sqrt()
    if not magnitude.isfinite().all():
        raise UserError("the decoder's features are not finite")
    return magnitude.cpu().numpy()


def inside(array: Array) -> Array:
    """Cuts an eighth of the side from each border of a map or an image, (H, W) or (H, W, C).

    Zero padding makes the magnitudes at the borders unlike the rest.
    """
    rows, columns = (-(-length // 8) for length in array.shape[:2])
    return array[rows:-rows, columns:-columns]


def imbalance(magnitudes: Sequence[Magnitude]) -> float:
    """Returns the 99.9th percentile of a map's magnitudes divided by their median, averaged over the maps.

    This measure is ours. The paper has none; it speaks of "certain areas having significantly stronger
    magnitudes", so the measure compares the strongest pixels with a typical one. It depends neither on the scale
    of the features, which GroupNorm removes and SMC does not, nor on the number of channels. It is at least 1,
    and 1 for a constant map. Unlike the maximum, the percentile does not grow with the number of pixels: it
    leaves out one pixel in a thousand.

    Args:
        magnitudes: results of `feature_magnitude` for at least one image.

    Raises:
        ValueError: there is no map, or the median of a map is 0.
    """
    if not magnitudes:
        raise ValueError("there must be at least one map, got none")
    ratios = []
    for magnitude in magnitudes:
        median, strongest = np.percentile(magnitude, (50, STRONGEST))
        if not median > 0:
            raise ValueError(f"a map's median must be above 0 for its imbalance, got {median}")
        ratios.append(strongest / median)
    return float(np.mean(ratios))


def draw_feature_maps(
    images: Sequence[tuple[str, Pixels]],
    magnitudes: Mapping[str, Sequence[Magnitude]],
    imbalances: Mapping[str, float],
    path: Path,
) -> None:
    """Draws one row per image: the image, then the map of each model.

    Each map is divided by its median. Colours mean the same in all maps; the brightest is the largest 99.9th
    percentile of all models.

    Args:
        images: label of the row and (H, W, C) pixels.
        magnitudes: results of `feature_magnitude` by model, one per image.
        imbalances: imbalance of each model, printed above its maps; more images may have been measured.
        path: PNG file to write.
    """
    columns = 1 + len(magnitudes)
    figure = Figure(figsize=(2.9 * columns, 2.8 * len(images) + 1.1), dpi=DPI, layout="compressed")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, (label, image) in enumerate(images):
        axes[row, 0].imshow(to_picture(image), interpolation="antialiased")
        axes[row, 0].set_ylabel(label)
    axes[0, 0].set_title("input", fontsize=10)
    # Fractions of a whole column: the colour bar keeps its size however many rows there are.
    room: dict[str, Any] = {"fraction": 0.1 / len(images), "pad": 0.04 / len(images), "shrink": 0.85}
    relative = {name: [each / np.median(each) for each in maps] for name, maps in magnitudes.items()}
    top = max(
        np.percentile(np.concatenate([values.ravel() for values in maps]), STRONGEST)
        for maps in relative.values()
    )
    for column, (name, maps) in enumerate(relative.items(), start=1):
        for row, values in enumerate(maps):
            shown = axes[row, column].imshow(
                values, vmin=0, vmax=top, cmap="magma", interpolation="antialiased"
            )
        title = f"{textwrap.fill(name, 32)}\nimbalance {imbalances[name]:.2f}"
        axes[0, column].set_title(title, fontsize=10)
        bar = figure.colorbar(shown, ax=axes[:, column], location="bottom", aspect=25, extend="max", **room)
        bar.set_label("RMS over channels / its median", fontsize=9)
    for each in axes.flat:
        each.set_xticks([])
        each.set_yticks([])
        each.spines[:].set_visible(False)
    figure.savefig(path)
