"""A model's files: one resolver of a run's folder, loading, saving and hashing of weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.files import replacing_folder, write
from litevae.models.interface import Autoencoder


def write_model(model: ModelMixin, folder: Path) -> None:
    """Writes what `from_pretrained` reads, config.json and the weights as safetensors, to a new folder."""
    folder.mkdir()
    write(folder / "config.json", model.to_json_string().encode())
    write_tensors(folder / WEIGHTS, model.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(contiguous, {"format": "pt"}))


def save_model(model: ModelMixin, folder: Path) -> None:
    """Writes `model` (config.json and safetensors) to `folder`, replacing a model that is there."""
    with replacing_folder(folder) as new:
        write_model(model, new)


WEIGHTS = "diffusion_pytorch_model.safetensors"


# what a model's config.json holds besides its architecture
NOT_ARCHITECTURE = frozenset(
    {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}
)


def load_weights(model: ModelMixin, folder: Path, what: str) -> None:
    """Gives `model` the weights in `folder`; UserError, naming the difference, for another architecture."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {folder}/config.json: cannot be read: {error}") from None
    mine = json.loads(model.to_json_string())
    for key, value in mine.items():
        if (key.startswith("_") and key != "_class_name") or key in NOT_ARCHITECTURE:
            continue
        if saved.get(key, value) != value:
            raise UserError(
                f"{what}: {folder} has another architecture: {key} is {saved[key]} there and {value} here"
            )
    copy_weights(model, read_weights(folder / WEIGHTS, what), folder, what)


def load_decoder(model: Autoencoder, folder: Path) -> None:
    """Gives the decoder the weights of a diffusers AutoencoderKL's, such as Stable Diffusion's.

    Its post_quant_conv comes along where the model has one.
    """
    if (folder / "vae" / "config.json").is_file():  # a whole pipeline
        folder = folder / "vae"
    weights = read_weights(folder / WEIGHTS, "init_decoder")
    parts = {"decoder": model.decoder, "post_quant_conv": model.post_quant_conv}
    for name, part in parts.items():
        if part is not None:
            own = {
                key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")
            }
            copy_weights(part, own, folder, "init_decoder")


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{what}: {path}: no such file")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {path}: cannot be read: {error}") from None


def copy_weights(module: nn.Module, weights: dict[str, Tensor], source: Path, what: str) -> None:
    """Copies `weights` into a module; UserError unless names and shapes are the same."""
    own: dict[str, Tensor] = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{what}: {source} has no {name}: another architecture")
        if name not in own:
            raise UserError(f"{what}: {source} has a {name} that this model has not: another architecture")
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{what}: {source} has another architecture: {name} is {tuple(weights[name].shape)} there "
                f"and {tuple(own[name].shape)} here"
            )
    module.load_state_dict(weights)


def hash_encoder(model: Autoencoder) -> str:
    """SHA-256 of what decides a model's latents: its architecture and its encoder's weights."""
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
