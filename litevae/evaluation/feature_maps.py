"""The decoder's last feature maps, and how unevenly strong they are (Section 4.2, Figure 3)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from litevae.data.images import Pixels
from litevae.errors import UserError
from litevae.evaluation.reconstruction import encode
from litevae.models.interface import Autoencoder
from litevae.plotting import DPI

Magnitude = npt.NDArray[np.float64]  # (h, w)
STRONGEST = 99.9  # percentile


@torch.inference_mode()
def feature_magnitude(model: Autoencoder, image: Pixels) -> Magnitude:
    """How strong the features are at each place: their root mean square over the channels.

    The features are those that the decoder's last block gives, before the output's normalisation and
    convolution, for the mode of the image's posterior.

    Args:
        model: a LiteVAE or an `AutoencoderKL`, without tiling; it runs on its own device and in its own dtype.
        image: (H, W, 3) uint8, as `encode` takes it.

    Returns:
        (h, w): as many pixels as the image, padded as in `encode`; half as many along a side with wavelet
        output.

    Raises:
        ValueError: a size that the model does not take.
        UserError: the features are not finite.
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


def imbalance(magnitudes: Sequence[Magnitude]) -> float:
    """The 99.9th percentile of a map's magnitudes divided by their median, the mean over the maps.

    This number is ours. The paper has none and speaks of "certain areas having significantly stronger
    magnitudes": so it compares the strongest places with a typical one. It does not depend on the features'
    scale, which GroupNorm removes and SMC does not, nor on the number of channels; it is at least 1, and 1
    for a map that is equally strong everywhere. The percentile, unlike the maximum, does not grow with the
    number of pixels: it leaves out one in a thousand.

    Args:
        magnitudes: as `feature_magnitude` gives them, of at least one image.

    Raises:
        ValueError: none given, or a map whose median is 0.
    """
    if not magnitudes:
        raise ValueError("there must be one map at least, got none")
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
    """A row for each image, with a map for each model beside it.

    A map is divided by its median. A colour means the same in all maps; the brightest is the largest model's
    99.9th percentile.

    Args:
        images: what to write beside the row, and (H, W, 3) uint8.
        magnitudes: by model, one for each image, as `feature_magnitude` gives them.
        imbalances: by model, to write above its maps; they may be of more images.
        path: the PNG to write.
    """
    columns = 1 + len(magnitudes)
    figure = Figure(figsize=(2.9 * columns, 2.8 * len(images) + 1.1), dpi=DPI, layout="compressed")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, (label, image) in enumerate(images):
        axes[row, 0].imshow(image, interpolation="antialiased")
        axes[row, 0].set_ylabel(label)
    axes[0, 0].set_title("input", fontsize=10)
    # parts of a whole column, of which a bar takes as much however many rows there are
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
