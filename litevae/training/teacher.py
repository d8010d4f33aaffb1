"""The autoencoder whose latents an encoder learns to produce: distillation into the latent space of another model."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litevae.data.config import DataConfig
from litevae.errors import UserError, shorten
from litevae.files import sha256
from litevae.models.card import PATH
from litevae.models.config import ModelConfig
from litevae.models.interface import Autoencoder, pixel_format
from litevae.models.layers import NoConv2d
from litevae.models.loading import load_model, model_folder
from litevae.models.weight_files import find_weights, weight_files
from litevae.models.weights import copy_weights

# Pipelines normalise a model's latents by these settings; force_upcast is about the precision of its decoder.
TAKEN_OVER = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


class Teacher(nn.Module):
    """The frozen encoder of an autoencoder, which runs in float32.

    In bfloat16, the rounding error of a mean may exceed the posterior's standard deviation.

    Args:
        path: folder of the autoencoder, as `load_teacher` takes it.

    Raises:
        UserError: `load_teacher` raised it.

    Attributes:
        folder: folder with the autoencoder's config.json and weights.
        digests: SHA-256 of each file of its weights.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = load_teacher(path).eval().requires_grad_(False)
        self.folder = teacher_folder(path)
        self.digests = {file.name: sha256(file) for file in weight_files(find_weights(self.folder)[0])}

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the posterior's mean and log-variance, both (N, n_z, h, w), of images (N, C, H, W) in [-1, 1]."""
        with torch.autocast(image.device.type, enabled=False):
            posterior = self.model.encode(image.float()).latent_dist
        return posterior.mean, posterior.logvar

    def teach(self, model: Autoencoder) -> None:
        """Gives a model the decoder of the teacher, frozen, and the normalisation of its latents.

        The teacher keeps only its encoder.

        Raises:
            UserError: the decoders differ in architecture.
        """
        take_over_scale(model, self.model.config)
        for name in ("decoder", "post_quant_conv"):
            own, taken = getattr(model, name), getattr(self.model, name)
            if own is not None and taken is not None:
                copy_weights(own, taken.state_dict(), self.folder, "teacher")
                own.requires_grad_(False)
        self.model.decoder = nn.Identity()  # frees its memory


def take_over_scale(model: Autoencoder, config: Mapping[str, Any]) -> None:
    """Gives a model the normalisation of the latents in another model's configuration."""
    own = inspect.signature(type(model)).parameters
    model.register_to_config(
        **{name: config.get(name, own[name].default) for name in TAKEN_OVER if name in own}
    )


def teacher_folder(path: str) -> Path:
    """Returns the folder with the config.json of the teacher at `path`, which may be a pipeline with a VAE."""
    vae = Path(path) / "vae"
    return vae if (vae / "config.json").is_file() else model_folder(Path(path))


def load_teacher(path: str) -> Autoencoder:
    """Loads the autoencoder in a folder.

    Args:
        path: folder of a diffusers `AutoencoderKL` or of a pipeline with one, or what `model_folder` takes.

    Raises:
        UserError: there is no such folder, files are missing or damaged, or LiteVAE does not have such a decoder.
    """
    try:
        folder = teacher_folder(path)
        model = load_model(folder)
        pixel_format(model)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    config = model.config
    for name, allowed in {
        "act_fn": ("silu", "swish"),
        "mid_block_add_attention": (True,),
        "decoder_norm": ("group", "smc"),
    }.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"teacher: {folder}: {name} must be {str(allowed[0]).lower()} for LiteVAE's decoder to take its "
                f"weights, got {shorten(config[name])}"
            )
    return model


def teacher_settings(teacher: Autoencoder) -> dict[str, Any]:
    """Returns the settings of `ModelConfig` that give a LiteVAE the latent and the decoder of a teacher."""
    config = teacher.config
    return {
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "num_groups": config.get("num_groups") or config.norm_num_groups,
        "decoder_norm": config.get("decoder_norm", "group"),
        "output_type": config.get("output_type", "image"),
        "use_1x1_conv": not isinstance(teacher.post_quant_conv, NoConv2d | None),
    }


def image_settings(teacher: Autoencoder) -> dict[str, Any]:
    """Returns the settings of `DataConfig` that give a model the images that a teacher takes."""
    images = pixel_format(teacher)
    values = images.value_range
    return {"channels": images.channels, "value_range": None if values is None else list(values)}


def as_overrides(settings: Mapping[str, Any], section: str = "model") -> list[str]:
    """Returns settings of a section as they are written on the command line."""

    def write(value: Any) -> str:
        return "null" if value is None else str(value).replace(" ", "").lower()

    return [f"{section}.{name}={write(value)}" for name, value in settings.items()]


def check_student(model: ModelConfig, data: DataConfig, teacher: Teacher) -> None:
    """Raises UserError, which names the settings to change, if a model cannot take a teacher's place.

    That is so if its latent, its decoder or its images are others.
    """
    own = asdict(model)
    different = {name: value for name, value in teacher_settings(teacher.model).items() if own[name] != value}
    needed = as_overrides(different)
    if data.pixel_format != pixel_format(teacher.model):
        needed += as_overrides(image_settings(teacher.model), "data")
    if needed:
        raise UserError(f"teacher: {teacher.folder} needs {' '.join(needed)}")


def describe_teacher(teacher: Teacher) -> str:
    """Returns the section of a model card that says whose latents a distilled model makes."""
    digests = "\n".join(f"- `{name}`, SHA-256 `{digest}`" for name, digest in teacher.digests.items())
    values = {name: teacher.model.config.get(name) for name in TAKEN_OVER[:-1]}
    scale = ", ".join(f"{name} {shorten(value)}" for name, value in values.items() if value is not None)
    return f"""
## Whose latents it makes

The encoder learned to produce the posterior of the {type(teacher.model).__name__} in {teacher.folder.as_posix()}, with
these weights:

{digests}

The decoder is that autoencoder's, unchanged and under its licence, and so is the normalisation of the latents: {scale}.
Do not run `litevae scale` on this model. It takes the place of `vae` in the pipelines of that autoencoder:

```python
from litevae import LiteVAE

pipe.vae = LiteVAE.from_pretrained("{PATH}")
```
"""
