"""What a model's latents look like, and how far they are from Gaussian noise (Table 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.sources import ImageSource
from litevae.data.squares import SquareDataset
from litevae.errors import UserError
from litevae.evaluation.reconstruction import sample_posterior
from litevae.latents.statistics import LatentStatistics, latent_statistics
from litevae.models.interface import Autoencoder, check_size, encode_pixels
from litevae.plotting import DPI

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # of Table 6


@dataclass(frozen=True)
class Discrepancy:
    """Squared maximum mean discrepancy for one kernel: mean and standard deviation over groups of images."""

    sigma: float
    mean: float
    std: float


@torch.inference_mode()
def collect_latents(
    model: Autoencoder,
    images: ImageSource,
    size: int = 256,
    count: int = 2000,
    batch_size: int = 16,
    workers: int = 4,
) -> Tensor:
    """Samples of the posteriors of images' middle squares, resized to `size` pixels.

    Each image's sample is drawn from its number: the same images give the same latents. Shows a progress bar on
    stderr.

    Args:
        model: of 3 channels; it runs on its own device and in its own dtype.
        images: of which `count` are taken at equal distances, or all if there are fewer; those that cannot
            be read are left out.

    Returns:
        (N, n_z, h, w) float32, on the CPU.

    Raises:
        UserError: a size or a number of channels that do not fit the model, no image that can be read, or
            latents that are not finite.
    """
    check_size(model, size)
    squares = SquareDataset(images, size, count)
    loader = DataLoader(squares, batch_size, num_workers=workers, collate_fn=squares.collate)
    latents = []
    for batch in tqdm(loader, unit="batch", mininterval=0.5):
        numbers, pixels = batch.readable
        if numbers:
            posterior = encode_pixels(model, pixels)
            latents.append(sample_posterior(posterior, numbers).float().cpu())
    if not latents:
        raise UserError("none of the images can be read")
    result = torch.cat(latents)
    if not result.isfinite().all():
        raise UserError("the model's latents are not finite")
    return result


def squared_mmd(x: Tensor, y: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012, Equation 3).

    The kernels are k(a, b) = exp(-|a - b|² / (2 sigma²)). The estimate may be below 0.

    Args:
        x, y: samples of the two distributions, (M, d) and (N, d), at least two each.
        sigmas: one for each kernel.

    Returns:
        (len(sigmas),) float64.

    Raises:
        ValueError: fewer samples, or of different lengths.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y must be (M, d) and (N, d), M and N at least 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()
    within_x, within_y, between = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)

    def mean_of_pairs(kernel: Tensor) -> Tensor:
        count = len(kernel)  # a sample and itself are no pair
        return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))

    estimates = []
    for sigma in sigmas:
        kernels = [torch.exp(d / (-2 * sigma**2)) for d in (within_x, within_y, between)]
        estimates.append(mean_of_pairs(kernels[0]) + mean_of_pairs(kernels[1]) - 2 * kernels[2].mean())
    return torch.stack(estimates)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(M, d) and (N, d) to (M, N)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp_(min=0)  # rounding may leave it below


def distance_from_gaussian(
    latents: Tensor, sigmas: Sequence[float] = SIGMAS, groups: int = 10
) -> list[Discrepancy]:
    """The squared MMD between latents and samples of a standard Gaussian, for each kernel, with error bars.

    A latent is one vector of n_z·h·w elements, divided by the standard deviation of all elements together, as
    diffusion models see it. The latents are shared out among disjoint groups, each of which is compared with
    as many Gaussian samples of its own, the same each time.

    The paper states neither its unit nor how it scales latents.

    Args:
        latents: (N, n_z, h, w).
        groups: at least 2.

    Raises:
        UserError: fewer than two latents for a group, or latents that are all equal.
    """
    if groups < 2 or len(latents) < 2 * groups:
        raise UserError(
            f"{len(latents)} images cannot be shared among {groups} groups: there must be two groups at least, "
            "of two images each"
        )
    vectors = latents.double().flatten(1) * latent_statistics(latents).scaling_factor
    generator = torch.Generator().manual_seed(-1)  # images' samples are drawn from 0, 1, 2, ...
    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
    # every groups-th one: neighbours in a data set are often alike
    estimates = torch.stack(
        [squared_mmd(vectors[i::groups], noise[i::groups], sigmas) for i in range(groups)]
    )
    return [
        Discrepancy(sigma, mean, std)
        for sigma, mean, std in zip(
            sigmas, estimates.mean(0).tolist(), estimates.std(0).tolist(), strict=True
        )
    ]


def draw_distances(statistics: LatentStatistics, discrepancies: Sequence[Discrepancy], path: Path) -> None:
    """The squared MMD over sigma with error bars, beside the channels' means and standard deviations.

    Args:
        statistics, discrepancies: of one model, as `latent_statistics` and `distance_from_gaussian` give them.
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(
        [d.sigma for d in discrepancies],
        [1000 * d.mean for d in discrepancies],
        [1000 * d.std for d in discrepancies],
        fmt="o-",
        capsize=4,
        linewidth=1.4,
    )
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set(
        xscale="log",
        xlabel="sigma of the RBF kernel",
        ylabel="1000 MMD² (mean ± standard deviation)",
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
