"""The model of a training run: built from its settings, or with weights to start from."""

import json
from dataclasses import asdict
from pathlib import Path

from diffusers import AutoencoderKL, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.models import LiteVAE
from litevae.models.baseline import Autoencoder, SmallEncoderVAE
from litevae.training.config import Config, ModelConfig
from litevae.training.initialise import initialise

WEIGHTS = "diffusion_pytorch_model.safetensors"
# what a model's config.json holds besides its architecture
NOT_ARCHITECTURE = frozenset(
    {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}
)


def build_model(config: Config) -> Autoencoder:
    """The model of `config`, with fresh weights or those of `config.init` and `config.init_decoder`.

    Raises:
        UserError: settings that the model does not take, or weights that are missing, broken or another
            architecture's.
    """
    try:
        model = with_fresh_weights(config.model, config.data.size)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if config.init:
        load_weights(model, weights_folder(Path(config.init)), "init")
    if config.init_decoder:
        load_decoder(model, Path(config.init_decoder))
    if config.freeze_encoder:
        for part in (model.encoder, model.quant_conv):
            if part is not None:
                part.requires_grad_(False)
    return model


def with_fresh_weights(config: ModelConfig, size: int) -> Autoencoder:
    """A model to train from nothing; ValueError for settings it does not take."""
    if config.kind == "litevae":
        settings = asdict(config)
        for name in ("kind", "preset", "encoder_block_out_channels"):
            del settings[name]
        model: Autoencoder = LiteVAE.from_preset(config.preset, sample_size=size, **settings)
    else:
        model = baseline(config, size)
    initialise(model)
    return model


def baseline(config: ModelConfig, size: int) -> AutoencoderKL:
    settings = {
        "latent_channels": config.latent_channels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.num_groups,
        "use_quant_conv": config.use_1x1_conv,
        "use_post_quant_conv": config.use_1x1_conv,
        "sample_size": size,
        "scaling_factor": 1.0,
    }
    if config.encoder_block_out_channels:
        return SmallEncoderVAE(tuple(config.encoder_block_out_channels), **settings)
    if config.kind == "vae-small":
        return SmallEncoderVAE(**settings)
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        force_upcast=False,
        **settings,
    )


def weights_folder(path: Path) -> Path:
    """The model's folder in `path`: itself, or in a run's or checkpoint's; the averaged one where there is."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for folder in (path, path / "ema", path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: not a model: there is no config.json in it")


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
