"""Saving, loading and hashing the weights of models."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import safetensors.torch
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from litevae.errors import UserError, shorten
from litevae.files import read_json, replacing_folder, write
from litevae.models.layers import NoConv2d
from litevae.models.loading import read_config
from litevae.models.weight_files import WEIGHTS, read_weights

if TYPE_CHECKING:
    from litevae.models.interface import Autoencoder

# Entries of a model's config.json that do not belong to its architecture.
NOT_ARCHITECTURE = frozenset(
    {
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "force_upcast",
        "latents_mean",
        "latents_std",
        "value_range",
    }
)


# Classes of autoencoders whose decoder has the architecture of Stable Diffusion's, and where they are defined.
SAME_DECODER = {
    "AutoencoderKL": "diffusers'",
    "AutoencoderKLFlux2": "diffusers'",
    "VQModel": "diffusers'",
    "SmallEncoderVAE": "litevae.models'",
}


def write_model(model: ModelMixin, folder: Path) -> None:
    """Writes config.json and the weights as safetensors to a new folder, for `from_pretrained` to read."""
    folder.mkdir()
    write(folder / "config.json", model.to_json_string().encode())
    write_tensors(folder / WEIGHTS, model.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(contiguous, {"format": "pt"}))


def save_model(model: ModelMixin, folder: Path, card: str | None = None) -> None:
    """Writes config.json, the weights of `model` and its card, README.md, to `folder`, replacing any model there."""
    with replacing_folder(folder) as new:
        write_model(model, new)
        if card is not None:
            write(new / "README.md", card.encode())


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
    kind: Any = None
    with contextlib.suppress(UserError):  # the weights alone may do
        kind = read_config(source / "config.json").get("_class_name")
    if kind not in (None, "LiteVAE", *SAME_DECODER) and hasattr(diffusers, str(kind)):
        raise UserError(f"{setting}: {source} holds a model of class {kind}: {advice(str(kind))}")
    weights = read_weights(source, setting)
    if not any(name.startswith("decoder.") for name in weights):
        raise UserError(f"{setting}: {source}: holds no decoder of an autoencoder")
    parts = {"decoder": model.decoder}
    if not isinstance(model.post_quant_conv, NoConv2d | None):
        parts["post_quant_conv"] = model.post_quant_conv
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        copy_weights(part, own, source, setting, f"{name}.")


def advice(kind: str) -> str:
    """Returns how to load a model of another class than LiteVAE, and whether a LiteVAE can take its decoder."""
    if kind in SAME_DECODER:
        return (
            f"load it with {SAME_DECODER[kind]} {kind}, or its decoder into a LiteVAE with load_decoder "
            "(init_decoder in training)"
        )
    load = f"load it with diffusers' {kind}; " if hasattr(diffusers, kind) else ""
    return f"{load}a LiteVAE takes only the decoder of an AutoencoderKL, with load_decoder"


def copy_weights(
    module: nn.Module, weights: dict[str, Tensor], source: Path, setting: str, prefix: str = ""
) -> None:
    """Copies `weights`, read from `source`, into a module.

    Raises:
        UserError: names or shapes differ. The message begins with `setting` and names a weight, after `prefix`.
    """
    own: dict[str, Tensor] = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{setting}: {source} has another architecture: it lacks {prefix}{name}")
        if name not in own:
            raise UserError(
                f"{setting}: {source} has another architecture: this model lacks its {prefix}{name}"
            )
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{setting}: {source} has another architecture: {prefix}{name} is {tuple(weights[name].shape)} there "
                f"and {tuple(own[name].shape)} here"
            )
    module.load_state_dict(weights)


def explain_shapes(model: type[ModelMixin], config: Mapping[str, Any], path: Path) -> str | None:
    """Returns which weight has another shape than in the model, after `from_pretrained` has failed; None if none has.

    Args:
        model: class of the model.
        config: configuration of the model.
        path: weights, as `find_weights` returns them.
    """
    try:
        with torch.device("meta"):
            own = model.from_config(dict(config)).state_dict()
        weights = read_weights(path, "")
    except Exception:  # diffusers' constructors let almost anything through, as they did before
        return None
    for name, tensor in own.items():
        if name in weights and weights[name].shape != tensor.shape:
            return (
                f"{name} is {tuple(weights[name].shape)} in {path.name} and {tuple(tensor.shape)} in the model of "
                "config.json: use the files of one model"
            )
    return None


def hash_encoder(model: "Autoencoder") -> str:
    """Returns the SHA-256 of what determines a model's latents: architecture, range of values and encoder weights."""
    config = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and name not in NOT_ARCHITECTURE
    }
    if model.config.get("value_range") is not None:  # without one, the hash is that of older versions
        config["value_range"] = list(model.config.value_range)
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True).encode())
    for part in (model.encoder, model.quant_conv):
        for name, tensor in part.state_dict().items() if part is not None else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
