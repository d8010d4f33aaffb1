"""Saving, loading and hashing the weights of models."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from litevae.errors import UserError, shorten
from litevae.files import read_json, replacing_folder, write
from litevae.models.weight_files import WEIGHTS, read_weights

if TYPE_CHECKING:
    from litevae.models.interface import Autoencoder

# Entries of a model's config.json that do not belong to its architecture.
NOT_ARCHITECTURE = frozenset(
    {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}
)


def write_model(model: ModelMixin, folder: Path) -> None:
    """Writes config.json and the weights as safetensors to a new folder, for `from_pretrained` to read."""
    folder.mkdir()
    write(folder / "config.json", model.to_json_string().encode())
    write_tensors(folder / WEIGHTS, model.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(contiguous, {"format": "pt"}))


def save_model(model: ModelMixin, folder: Path) -> None:
    """Writes config.json and the weights of `model` to `folder`, replacing any model that is there."""
    with replacing_folder(folder) as new:
        write_model(model, new)


def load_weights(model: ModelMixin, folder: Path, setting: str) -> None:
    """Copies the weights in `folder` into `model`.

    Args:
        model: model of the same architecture.
        folder: folder with config.json and the weights, as `write_model` writes it.
        setting: name of the setting that gave the folder, for error messages.

    Raises:
        UserError: a file is missing or damaged, or the architecture differs; the message names the difference.
    """
    config = folder / "config.json"
    try:
        saved = read_json(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {config}: cannot be read: {error}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{setting}: {config}: not a model's configuration")
    for key, value in json.loads(model.to_json_string()).items():
        if (key.startswith("_") and key != "_class_name") or key in NOT_ARCHITECTURE:
            continue
        if saved.get(key, value) != value:
            raise UserError(
                f"{setting}: {folder} has another architecture: {key} is {shorten(saved[key])} there and "
                f"{shorten(value)} here"
            )
    copy_weights(model, read_weights(folder, setting), folder, setting)


def load_decoder(model: "Autoencoder", source: Path, setting: str = "init_decoder") -> None:
    """Copies the decoder of another autoencoder, such as Stable Diffusion's, into `model`.

    If the model has a post_quant_conv, it is copied too.

    Args:
        model: model whose decoder has the same architecture.
        source: folder of the autoencoder, or of a pipeline with one; or a file, as `read_weights` takes it.
        setting: name of the setting that gave the source, for error messages.

    Raises:
        UserError: a file is missing or damaged, holds no decoder, or the architecture differs.
    """
    if (source / "vae" / "config.json").is_file():  # a whole pipeline
        source = source / "vae"
    weights = read_weights(source, setting)
    if not any(name.startswith("decoder.") for name in weights):
        raise UserError(f"{setting}: {source}: holds no decoder of an autoencoder")
    parts = {"decoder": model.decoder}
    if isinstance(model.post_quant_conv, nn.Conv2d):
        parts["post_quant_conv"] = model.post_quant_conv
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        copy_weights(part, own, source, setting)


def copy_weights(module: nn.Module, weights: dict[str, Tensor], source: Path, setting: str) -> None:
    """Copies `weights`, read from `source`, into a module. Raises UserError if names or shapes differ."""
    own: dict[str, Tensor] = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{setting}: {source} has another architecture: it lacks {name}")
        if name not in own:
            raise UserError(f"{setting}: {source} has another architecture: this model lacks its {name}")
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{setting}: {source} has another architecture: {name} is {tuple(weights[name].shape)} there "
                f"and {tuple(own[name].shape)} here"
            )
    module.load_state_dict(weights)


def hash_encoder(model: "Autoencoder") -> str:
    """Returns the SHA-256 of all that determines a model's latents: its architecture and encoder weights."""
    config = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and name not in NOT_ARCHITECTURE
    }
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True).encode())
    for part in (model.encoder, model.quant_conv):
        for name, tensor in part.state_dict().items() if part is not None else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
