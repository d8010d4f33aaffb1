"""Loading autoencoders from a folder or by name."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litevae.errors import LONGEST_VALUE, UserError, one_line
from litevae.files import read_json, why_missing
from litevae.models.arguments import check_config

if TYPE_CHECKING:
    from litevae.models.interface import Autoencoder

MODELS: tuple[str, ...] = ("LiteVAE", "AutoencoderKL", "SmallEncoderVAE")  # class names
DIFFUSERS = "diffusers:"
LONGEST_CONFIG = 2**20  # bytes of a config.json


def model_folder(path: Path) -> Path:
    """Returns the folder that holds config.json and the weights of a model.

    Args:
        path: folder of a model; of a training run, whose model is in `model/`; of a checkpoint, whose averaged
            weights in `ema/` are preferred to those in `model/`; or "diffusers:" followed by the folder of an
            AutoencoderKL or of a pipeline with one.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    within = ("", "vae") if str(path).startswith(DIFFUSERS) else ("", "ema", "model")
    path = Path(str(path).removeprefix(DIFFUSERS))
    if not os.path.isdir(path):  # Path.is_dir lets some errors through
        is_file = os.path.isfile(path)
        raise UserError(
            f"{path}: {'is a file, not a model folder' if is_file else why_missing(path, 'folder')}"
        )
    for folder in (path / name for name in within):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: not a model: there is no config.json in it")


def report_weights(path: Path, folder: Path) -> None:
    """Prints to stderr, in the first process, which weights of the checkpoint `path` are in `folder`."""
    if not (path / "manifest.json").is_file() or os.environ.get("RANK", "0") != "0":
        return
    kind = "averaged" if folder == path / "ema" else "raw (not averaged)"
    print(f"{path}: loading the {kind} weights, {folder}", file=sys.stderr)


def read_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a model; `UserError` if it cannot be read, or is no mapping."""
    try:
        saved = read_json(path, longest=LONGEST_CONFIG)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a model's configuration: {error}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not a model's configuration")
    return saved


def load_model(path: Path) -> "Autoencoder":
    """Loads the autoencoder in a folder, and prints to stderr if it takes a checkpoint's averaged weights.

    Args:
        path: folder of a model, a run or a checkpoint, as `model_folder` takes it.

    Raises:
        UserError: there is no such folder, its model is neither a LiteVAE nor a baseline, or files are missing
            or damaged.
    """
    folder = model_folder(path)
    report_weights(path, folder)
    config = folder / "config.json"
    wanted, name = MODELS, "a LiteVAE"
    if str(path).startswith(DIFFUSERS):
        wanted, name = ("AutoencoderKL",), "an AutoencoderKL"
        path = Path(str(path).removeprefix(DIFFUSERS))
    saved = read_config(config)
    kind = saved.get("_class_name")
    if kind not in wanted:
        raise UserError(f"{path}: not {name} but {one_line(kind or 'something else', LONGEST_VALUE)}")

    from diffusers import AutoencoderKL

    from litevae.models import LiteVAE
    from litevae.models.baseline import SmallEncoderVAE
    from litevae.models.checks import warn_of_two_scales
    from litevae.models.weight_files import find_weights, weight_files
    from litevae.models.weights import explain_shapes

    classes = {each.__name__: each for each in (LiteVAE, AutoencoderKL, SmallEncoderVAE)}
    try:
        check_config(saved, classes[kind])
    except ValueError as error:
        raise UserError(f"{config}: {error}") from None
    try:
        weights, variant = find_weights(folder)
        weight_files(weights)  # they are regular files
        if variant is not None and os.environ.get("RANK", "0") == "0":
            print(f"{folder}: loading the weights of variant {variant}, the only ones", file=sys.stderr)
        model, loading = classes[kind].from_pretrained(
            folder,
            variant=variant,
            use_safetensors=".safetensors" in weights.name,  # or diffusers reports that it looks for both
            output_loading_info=True,
            local_files_only=True,
        )
    except UserError as error:
        raise UserError(f"{folder}: cannot be loaded: {str(error).removeprefix(f'{folder}: ')}") from None
    except Exception as error:  # diffusers and safetensors let almost anything through
        reason = explain_shapes(classes[kind], saved, weights) or error
        raise UserError(f"{folder}: cannot be loaded: {reason}") from None
    if loading["missing_keys"]:
        raise UserError(f"{folder}: its weights lack {loading['missing_keys'][0]} and perhaps others")
    if kind == "AutoencoderKL":  # the others warn by themselves
        warn_of_two_scales(model.config)
    return model


def find_model(name: str, size: int = 256) -> "Autoencoder":
    """Loads the model in a folder, as `load_model` does, or builds an untrained one by its name.

    Args:
        name: path of a folder; or the name of a preset, or sd-vae, with settings of `ModelConfig` after it, as in
            "litevae-b,latent_channels=12,aggregator=vit".
        size: side of the images that an untrained model is for, in pixels.

    Raises:
        UserError: `load_model` raised it, `name` is neither a folder nor such a name, or the model does not take
            the settings.
    """
    if os.path.exists(name) or name.startswith(DIFFUSERS):
        return load_model(Path(name))

    from litevae import settings
    from litevae.models.build import with_fresh_weights
    from litevae.models.config import ModelConfig, check_model_config
    from litevae.models.presets import get_preset

    kind, *overrides = re.split(r",(?=\w+=)", name)  # no key follows the commas in a list
    given = one_line(name, 2 * LONGEST_VALUE)
    if kind == "sd-vae":
        base = ["kind=sd-vae", "use_1x1_conv=true"]
    else:
        base = [f"preset={kind}"]
        try:
            get_preset(kind)
        except ValueError as error:
            raise UserError(f"{given}: {why_missing(name, 'folder')}, and {error}") from None
    for override in overrides:
        if override.startswith(("kind=", "preset=")):
            raise UserError(f"{given}: {kind} determines this already, got {override}")
    try:
        config = settings.load(ModelConfig, None, [*base, *overrides])
        check_model_config(config)
        return with_fresh_weights(config, size)
    except (UserError, ValueError) as error:
        raise UserError(f"{given}: {error}") from None
