"""The model of a training run, built from its settings."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from litevae.data.config import check_has_images
from litevae.errors import UserError
from litevae.losses import TEACHER_TERMS, least_side
from litevae.models.build import with_fresh_weights
from litevae.models.initialise import fix_variance
from litevae.models.interface import Autoencoder, check_size
from litevae.models.loading import model_folder, read_config, report_weights
from litevae.models.weights import load_decoder, load_weights
from litevae.training.config import Config, check_training_config
from litevae.training.teacher import Teacher, check_student, take_over_scale
from litevae_kernels import accelerate_vae


def build_model(config: Config, teacher: Teacher | None = None) -> Autoencoder:
    """Builds the model of a run, with fresh weights or those of `config.init`, `config.init_decoder` and the teacher.

    Args:
        config: settings of the run.
        teacher: teacher of the run; its decoder is taken over, and it keeps only its encoder.

    Raises:
        UserError: the model does not take a setting, or weights are missing, are damaged or belong to another
            architecture.
    """
    check_has_encoder(config)
    if teacher is not None:
        check_student(config.model, config.data, teacher)
    model = build_fresh_model(config)
    if isinstance(model, AutoencoderKL):
        accelerate_vae(model)  # A baseline's steps should not take longer for want of LiteVAE's kernels.
    if config.init:
        folder = model_folder(Path(config.init))
        report_weights(Path(config.init), folder)
        load_weights(model, folder, "init")
        if config.freeze_encoder:  # the latents stay as they are
            take_over_scale(model, read_config(folder / "config.json"))
    if config.init_decoder:
        load_decoder(model, Path(config.init_decoder))
    if teacher is not None:
        teacher.teach(model)
    if config.latent.std is not None:
        fix_variance(model, config.latent.std)
    for frozen, parts in (
        (config.freeze_encoder, (model.encoder, model.quant_conv)),
        (config.freeze_decoder, (model.decoder, model.post_quant_conv)),
    ):
        for part in parts if frozen else ():
            if part is not None:
                part.requires_grad_(False)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def load_teacher(config: Config) -> Teacher | None:
    """Loads the teacher of a run, if it has one; raises UserError if it needs one and cannot have it."""
    check_has_teacher(config)
    return Teacher(config.teacher) if config.teacher else None


def check_has_teacher(config: Config) -> None:
    """Raises UserError if a loss compares with a teacher, and none is given."""
    needing = [name for name in TEACHER_TERMS if getattr(config.loss, name)]
    if needing and not config.teacher:
        raise UserError(
            f"teacher is empty, and loss.{needing[0]} compares with it: give the folder of an AutoencoderKL"
        )


def check_has_encoder(config: Config) -> None:
    """Raises UserError if the encoder of a baseline is frozen before it has learned anything."""
    if config.freeze_encoder and config.model.kind != "litevae" and not config.init:
        raise UserError(
            "init is empty, and freeze_encoder=true would keep an untrained encoder: give the folder of a VAE"
        )


def build_fresh_model(config: Config) -> Autoencoder:
    """Builds the model of a run with fresh weights; raises UserError if it does not take a setting."""
    try:
        return with_fresh_weights(
            config.model, config.data.size, config.initialise == "wavelet", config.data.pixel_format
        )
    except ValueError as error:
        # The model's sample_size is the setting data.size.
        name, found, rest = str(error).partition("sample_size")
        raise UserError(f"data.size{rest}" if found and not name else f"model: {error}") from None


def check_run(config: Config) -> None:
    """Checks what a run checks before its first step, apart from files, weights and this machine.

    Raises:
        UserError: settings do not fit together, no training images are given, or the model does not take a setting
            or the size of a stage.
    """
    check_training_config(config)
    check_has_images(config.data)
    check_has_teacher(config)
    check_has_encoder(config)
    with torch.device("meta"):
        model = build_fresh_model(config)
    check_sizes(model, config)


def check_sizes(model: Autoencoder, config: Config) -> None:
    """Raises UserError if the model or a loss does not take the images of a stage."""
    sizes = {"data.size": config.data.size}
    for index, stage in enumerate(config.stages):
        if stage.size is not None and stage.start <= config.max_steps:
            sizes[f"stages[{index}].size"] = stage.size
    for name, size in sizes.items():
        check_size(model, size, name)
        if size < least_side(config.loss):
            raise UserError(f"{name} must be {least_side(config.loss)} or more for loss.st_lpips, got {size}")
