"""Metrics of a model during its training, on a fixed set of images."""

from collections.abc import Sequence

import torch

from litevae.data.pixels import Pixels, as_batch, to_model_range
from litevae.errors import UserError
from litevae.evaluation.fid import make_fid
from litevae.evaluation.metrics import (
    METRICS,
    Metric,
    check_metric_sizes,
    distance_networks,
    psnr,
    ssim,
)
from litevae.evaluation.reconstruction import reconstruct
from litevae.models.interface import Autoencoder


class Validation:
    """Measures models on images one by one, in this process alone, as `litevae.evaluation.evaluate` does.

    PSNR and SSIM are always measured. The networks of the other metrics are loaded once.

    Args:
        images: (H, W, C) images in the models' format.
        metrics: further metrics, from `METRICS`.

    Raises:
        UserError: the weights of Inception or VGG16 are missing and cannot be downloaded, the package of st_lpips is
            missing, the images are too small for a metric, or rFID is asked for and there are fewer than two.
    """

    def __init__(self, images: Sequence[Pixels], metrics: Sequence[Metric] = ()) -> None:
        self.images = images
        self.metrics = [name for name in METRICS if name in ("psnr", "ssim", *metrics)]
        if "rfid" in metrics and len(images) < 2:
            raise UserError(f"rfid needs at least two images, got {len(images)}")
        check_metric_sizes(metrics, [min(image.shape[:2]) for image in images])
        self.networks = distance_networks(metrics)
        self.fid = make_fid(None) if "rfid" in metrics else None
        if self.fid is not None:
            self.fid.reset_real_features = False  # those of the images stay the same
            self.fid.sync_on_compute = False  # the other processes do not take part
            self.fid.orig_dtype = torch.float64  # the dtype of the result
        self.seen = False  # whether `fid` has seen the images

    @torch.no_grad()
    def __call__(self, model: Autoencoder) -> tuple[dict[str, float], list[tuple[Pixels, Pixels]]]:
        """Returns the means of the metrics over the images, rFID, and each image with its reconstruction."""
        pairs = [(image, reconstruct(model, image)) for image in self.images]
        found: dict[str, float] = {
            name: sum(metric(*pair) for pair in pairs) / len(pairs)
            for name, metric in (("psnr", psnr), ("ssim", ssim))
        }
        for name, network in self.networks.to(model.device).items():
            distances = [
                network(*(to_model_range(as_batch(each).to(model.device)) for each in pair)) for pair in pairs
            ]
            found[name] = torch.stack(distances).double().mean().item()
        if self.fid is not None:
            found["rfid"] = self.measure_fid(pairs, model)
        return {name: found[name] for name in self.metrics}, pairs

    def measure_fid(self, pairs: Sequence[tuple[Pixels, Pixels]], model: Autoencoder) -> float:
        assert self.fid is not None
        fid = self.fid.to(model.device)
        for image, reconstruction in pairs:
            if not self.seen:
                fid.update(as_batch(image).to(model.device), real=True)
            fid.update(as_batch(reconstruction).to(model.device), real=False)
        self.seen = True
        distance: float = fid.compute().item()
        fid.reset()
        return distance
