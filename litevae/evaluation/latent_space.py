"""Statistics of a model's latents, and their distance from Gaussian noise (Table 6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy.stats import t as student
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.batches import Batches
from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.evaluation.reconstruction import sample_posterior
from litevae.latents.statistics import LatentStatistics, latent_statistics
from litevae.models.interface import Autoencoder, check_size, encode_pixels
from litevae.plotting import DPI

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # Table 6
# Number of elements of the latents that these bandwidths are meant for: n_z = 4 at 256 x 256 pixels and f = 8, the
# SD-VAE's. The paper does not say for which latents its figures are.
REFERENCE_ELEMENTS = 4 * 32 * 32


@dataclass(frozen=True)
class Discrepancy:
    """Squared maximum mean discrepancy with one kernel: mean and standard deviation over groups of images."""

    sigma: float
    mean: float
    std: float
    groups: int

    @property
    def half_width(self) -> float:
        """Returns half the width of the 95% confidence interval of the mean, by Student's t."""
        return float(student.ppf(0.975, self.groups - 1)) * self.std / math.sqrt(self.groups)


@torch.inference_mode()
def collect_latents(
    model: Autoencoder,
    images: ImageSource,
    size: int = 256,
    count: int = 2000,
    batch_size: int = 16,
    workers: int = 4,
) -> Tensor:
    """Samples the posteriors of images' middle squares, resized to `size` pixels.

    Each image's sample is seeded by its number, so the same images give the same latents. A progress bar is shown
    on stderr.

    Args:
        model: autoencoder; it runs on its own device and in its own dtype.
        images: source of the images; unreadable ones are left out.
        size: side of the squares in pixels.
        count: maximum number of images, evenly spaced over the source.
        batch_size: images per batch.
        workers: number of processes that decode images; 0 decodes in this one.

    Returns:
        The latents (N, n_z, h, w), float32, on the CPU.

    Raises:
        UserError: the model does not take this size, no image can be read, or a latent is not
            finite.
    """
    check_size(model, size)
    squares = SquareDataset(images, size, count)
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    latents = []
    for batch in tqdm(Batches(loader), unit="batch", mininterval=0.5):
        numbers, pixels = batch.readable
        if numbers:
            posterior = encode_pixels(model, pixels)
            latents.append(sample_posterior(posterior, numbers).float().cpu())
    if not latents:
        raise squares.none_readable()
    result = torch.cat(latents)
    if not result.isfinite().all():
        raise UserError("the model's latents are not finite")
    return result


def squared_mmd(x: Tensor, y: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Returns the unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012, Equation 3).

    The kernels are k(a, b) = exp(-|a - b|² / (2 sigma²)). The estimate may be below 0.

    Args:
        x, y: samples of the two distributions, (M, d) and (N, d), at least two each.
        sigmas: bandwidth of each kernel.

    Returns:
        The estimates (len(sigmas),), float64.

    Raises:
        ValueError: there are fewer samples, or their lengths differ.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y must be (M, d) and (N, d), M and N at least 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()
    within_x, within_y, between = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)

    def mean_of_pairs(kernel: Tensor) -> Tensor:
        count = len(kernel)  # a sample is not paired with itself
        return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))

    estimates = []
    for sigma in sigmas:
        kernels = [torch.exp(d / (-2 * sigma**2)) for d in (within_x, within_y, between)]
        estimates.append(mean_of_pairs(kernels[0]) + mean_of_pairs(kernels[1]) - 2 * kernels[2].mean())
    return torch.stack(estimates)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns the squared distances (M, N) between the rows of (M, d) and (N, d)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp_(min=0)  # rounding can make it negative


def distance_from_gaussian(
    latents: Tensor, sigmas: Sequence[float] | None = None, groups: int = 10
) -> list[Discrepancy]:
    """Returns the squared MMD between latents and samples of a standard Gaussian, per kernel, with error bars.

    Each latent is one vector of n_z·h·w elements, divided by the standard deviation of all elements together, as
    diffusion models see it. The latents are divided into disjoint groups, and each group is compared with as many
    Gaussian samples of its own, which are the same in every call.

    The paper states neither its unit nor how it scales latents.

    Args:
        latents: latents (N, n_z, h, w).
        sigmas: bandwidth of each kernel. None takes the paper's, scaled to the latent's size by `scaled_sigmas`.
        groups: number of groups, at least 2.

    Raises:
        UserError: a group would have fewer than two latents, or all latents are equal.
    """
    if groups < 2 or len(latents) < 2 * groups:
        raise UserError(
            f"{len(latents)} images cannot be shared among {groups} groups: there must be at least two groups "
            "of at least two images"
        )
    sigmas = scaled_sigmas(latents[0].numel()) if sigmas is None else sigmas
    vectors = latents.double().flatten(1) * latent_statistics(latents).scaling_factor
    generator = torch.Generator().manual_seed(-1)  # images' samples are drawn from 0, 1, 2, ...
    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
    # A group takes every groups-th latent, because neighbours in a data set are often alike.
    estimates = torch.stack(
        [squared_mmd(vectors[i::groups], noise[i::groups], sigmas) for i in range(groups)]
    )
    return [
        Discrepancy(sigma, mean, std, groups)
        for sigma, mean, std in zip(
            sigmas, estimates.mean(0).tolist(), estimates.std(0).tolist(), strict=True
        )
    ]


def scaled_sigmas(elements: int) -> list[float]:
    """Returns Table 6's bandwidths for latents of this number of elements.

    Two samples of a standard Gaussian of d elements are about sqrt(2d) apart. The bandwidths are multiplied by
    sqrt(d / 4096), so that they mean the same in every dimension, and are the paper's for 4096 elements.
    """
    return [sigma * math.sqrt(elements / REFERENCE_ELEMENTS) for sigma in SIGMAS]


def draw_distances(statistics: LatentStatistics, discrepancies: Sequence[Discrepancy], path: Path) -> None:
    """Plots the squared MMD over sigma with error bars, beside the channels' means and standard deviations.

    Args:
        statistics: result of `latent_statistics`.
        discrepancies: results of `distance_from_gaussian` for the same model.
        path: PNG file to write.
    """
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(
        [d.sigma for d in discrepancies],
        [1000 * d.mean for d in discrepancies],
        [1000 * d.half_width for d in discrepancies],
        fmt="o-",
        capsize=4,
        linewidth=1.4,
    )
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set(
        xscale="log",
        xlabel="sigma of the RBF kernel",
        ylabel="1000 MMD² (mean and 95% confidence interval)",
        title="distance from a standard Gaussian, over groups of images",
    )
    left.set_xticks([d.sigma for d in discrepancies], [f"{d.sigma:g}" for d in discrepancies])
    left.xaxis.set_minor_locator(NullLocator())
    right.errorbar(range(len(statistics.mean)), statistics.mean, statistics.std, fmt="o", capsize=4)
    right.axhline(0, color="0.5", linewidth=0.8)
    right.set(
        xlabel="latent channel",
        ylabel="mean ± standard deviation",
        title=f"latents of {statistics.count} images, unscaled",
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
