"""The typed configuration of a training run, read from YAML and `key=value` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from litevae import settings
from litevae.data.config import DataConfig
from litevae.errors import UserError
from litevae.evaluation.metrics import Metric, check_metrics_apply
from litevae.losses import RECONSTRUCTION_TERMS, RGB_TERMS, TEACHER_TERMS, LossConfig
from litevae.models.config import ModelConfig, check_model_config
from litevae.settings import section, setting
from litevae.training.sections import (
    AdversaryConfig,
    AutoencoderOptimizerConfig,
    LatentConfig,
    StageConfig,
    ValidatedCheckpointConfig,
)

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class RunConfig:
    """Settings that the training runs of autoencoders and of diffusion models share."""

    output_dir: str = setting("runs/train", "Folder that the run writes to.")
    seed: int = setting(0, "Seed of the random number generators.", minimum=0, maximum=2**32 - 1)
    max_steps: int = setting(100_000, "Number of steps to train for.", minimum=1, maximum=10**9)
    log_every: int = setting(100, "Steps between two lines of metrics.jsonl.", minimum=1)
    max_bad_steps: int = setting(
        10, "Steps in a row with a non-finite loss or gradient that end the run.", minimum=1
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Data type of autocast; weights stay in float32. auto: bf16 where the hardware multiplies it, otherwise fp32; "
        "a resumed run keeps the precision of its checkpoint.",
    )
    ema_decay: float = setting(
        0.9999,
        "Decay of the averaged (EMA) model, at most (1 + n) / (10 + n) at step n; 0 keeps no averaged model.",
        minimum=0,
        below=1,
    )
    tracker: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard", "Where metrics are logged besides metrics.jsonl."
    )
    resume: str = setting(
        "", "Folder of a checkpoint to resume from; auto for the newest in output_dir, if there is one."
    )


@dataclass
class Config(RunConfig):
    """Configuration of an autoencoder's training run."""

    max_epochs: float | None = setting(
        None,
        "Passes over the training images, instead of max_steps; null trains for max_steps.",
        minimum=1e-6,
    )
    validate_every: int = setting(1000, "Steps between two measurements on the validation images.", minimum=1)
    validate_metrics: list[Metric] = setting(
        ["psnr", "ssim"], "Metrics of the validation images; psnr and ssim are always measured."
    )
    gradient_ratio_every: int = setting(
        0,
        "Steps between two measurements of the adversarial gradient relative to the reconstruction's (Figure 7). "
        "Each costs two more backward passes; 0 turns them off.",
        minimum=0,
    )
    channels_last: bool = setting(True, "Keep models and images in the channels_last memory format.")
    compile: bool = setting(False, "Compile the models with torch.compile.")
    gradient_checkpointing: bool = setting(
        False, "Compute the autoencoder's activations twice instead of keeping them, which saves memory."
    )
    initialise: Literal["random", "wavelet"] = setting(
        "random",
        "Weights that training from scratch starts with: random; or those with which the latent consists of sub-bands "
        "of the image, for an encoder of U-Nets or a baseline. A decoder with group normalisation needs 4 channels or "
        "more per group (model.num_groups).",
    )
    init: str = setting("", "Folder of a model, run or checkpoint that provides the initial weights.")
    init_decoder: str = setting(
        "", "Folder or file of a Stable Diffusion VAE that provides the decoder's initial weights."
    )
    teacher: str = setting(
        "",
        "Folder of an autoencoder, or of a pipeline with one. The encoder learns to produce its latents "
        "(loss.teacher_kl and the like); its decoder is taken over and not trained.",
    )
    teacher_latents: str = setting(
        "",
        "Folder of the teacher's latents of data.train, which litevae encode has written; without it, the teacher "
        "encodes each crop.",
    )
    freeze_encoder: bool = setting(False, "Train only the decoder.")
    freeze_decoder: bool = setting(False, "Train only the encoder.")
    model: ModelConfig = section(ModelConfig, "The autoencoder.")
    data: DataConfig = section(DataConfig, "Images to train and to validate on.")
    stages: list[StageConfig] = setting(
        [], "Later stages of the run, which change the crop size and the batch size."
    )
    loss: LossConfig = section(LossConfig, "Weights and settings of the losses.")
    discriminator: AdversaryConfig = section(
        AdversaryConfig, "The discriminator, which is trained if loss.adversarial is above 0."
    )
    latent: LatentConfig = section(LatentConfig, "What happens to latents in training.")
    optimizer: AutoencoderOptimizerConfig = section(
        AutoencoderOptimizerConfig, "AdamW, which is Adam without weight decay."
    )
    checkpoint: ValidatedCheckpointConfig = section(
        ValidatedCheckpointConfig, "When checkpoints are written, and which are kept."
    )


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last` of a run, counted from 1. `first_sample` is the number of crops before the stage."""

    first: int
    last: int
    size: int
    batch_size: int
    first_sample: int


def list_stages(config: Config) -> list[Stage]:
    """Returns the run's stages in order. Each ends where the next begins, and the last ends with `max_steps`."""
    all_stages = [StageConfig(1, config.data.size, config.data.batch_size), *config.stages]
    result: list[Stage] = []
    size, batch_size, sample = config.data.size, config.data.batch_size, 0
    for index, stage in enumerate(all_stages):
        size, batch_size = stage.size or size, stage.batch_size or batch_size
        following = all_stages[index + 1].start if index + 1 < len(all_stages) else config.max_steps + 1
        last = min(following - 1, config.max_steps)
        if stage.start <= last:
            result.append(Stage(stage.start, last, size, batch_size, sample))
            sample += (last - stage.start + 1) * batch_size
    return result


def with_steps(config: Config, images: int) -> Config:
    """Returns the settings with the `max_steps` of `max_epochs`, if it is given.

    Args:
        config: settings of the run.
        images: number of training images.

    Raises:
        UserError: there are too many steps, or the gradient ratio is never measured.
    """
    if config.max_epochs is None:
        return config
    crops, most = round(config.max_epochs * images), 10**9
    stages = list_stages(replace(config, max_steps=most))
    # The last stage is as long as the remaining crops last.
    stage = next(each for each in reversed(stages) if each.first_sample < max(crops, 1))
    steps = stage.first - 1 + max(1, -(-(crops - stage.first_sample) // stage.batch_size))
    if steps > most:
        raise UserError(f"max_epochs={config.max_epochs} of {images} images are more than {most} steps")
    config = replace(config, max_steps=steps)
    check_gradient_ratio(config)
    return config


def shipped_configs() -> list[str]:
    """Returns the names of the training configurations that come with the package."""
    return settings.shipped(CONFIGS)


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """Returns the defaults, replaced by the file's settings and then by the overrides: see `litevae.settings.load`.

    Args:
        name: name of a shipped configuration, or a path that ends in .yaml; None for the defaults.
        overrides: settings such as "max_steps=20" or "data.size=64"; text is taken as it is given.

    Raises:
        UserError: there is no such configuration, its YAML is broken, a key is unknown (the message names the
            nearest), a value has the wrong type or is out of range, or settings do not fit together.
    """
    config = settings.load(Config, name, overrides, CONFIGS)
    check_training_config(config)
    return config


def check_training_config(config: Config) -> None:
    """Checks that settings whose values are in range fit together; a UserError names those that do not."""
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")
    check_model_config(config.model, "model.")
    check_channels(config)
    if config.model.encoder_type != "learned" and config.loss.kl:
        raise UserError(
            f"loss.kl must be 0 for model.encoder_type={config.model.encoder_type}, whose latent is a point and not a "
            f"distribution, got {config.loss.kl}"
        )
    if config.teacher_latents and not config.teacher:
        raise UserError("teacher_latents needs the teacher that they were encoded with: give teacher as well")
    if config.teacher_latents and config.data.crop != "middle":
        raise UserError(
            f"data.crop must be middle with teacher_latents, whose images are cropped so, got {config.data.crop}"
        )
    if config.teacher:
        check_distillation(config)
    elif not any(getattr(config.loss, name) for name in (*RECONSTRUCTION_TERMS, *TEACHER_TERMS)):
        raise UserError(
            f"every reconstruction loss ({', '.join(RECONSTRUCTION_TERMS)}) has weight 0: "
            "there is nothing to train for"
        )
    if config.loss.ldl and not config.ema_decay:
        raise UserError("loss.ldl compares with the averaged model: ema_decay must be above 0")
    check_freezing(config)
    check_latent(config)
    best_by = config.checkpoint.best_by
    if best_by not in ("psnr", "ssim", *config.validate_metrics):
        raise UserError(f"checkpoint.best_by={best_by} is not measured: add {best_by} to validate_metrics")
    check_discriminator(config)
    if config.max_epochs is None:  # otherwise the number of steps is not known yet
        check_gradient_ratio(config)
    check_stages(config)


def check_channels(config: Config) -> None:
    """Checks that the model, the losses and the metrics take the images; a UserError names a setting that does not."""
    pixel_format, kind = config.data.pixel_format, config.model.kind
    if pixel_format.value_range is not None and kind != "litevae":
        raise UserError(
            f"data.value_range must be null for model.kind={kind}, whose config.json cannot hold it, got "
            f"{list(pixel_format.value_range)}"
        )
    if config.loss.repeat_channels and pixel_format.channels != 1:
        raise UserError(
            "loss.repeat_channels must be false unless data.channels=1, got "
            f"data.channels={pixel_format.channels}"
        )
    for name in RGB_TERMS:
        repeated = pixel_format.channels == 1 and config.loss.repeat_channels
        if getattr(config.loss, name) and pixel_format.channels != 3 and not repeated:
            instead = ", or set loss.repeat_channels=true" if pixel_format.channels == 1 else ""
            raise UserError(
                f"loss.{name} compares RGB images: its weight must be 0 for data.channels={pixel_format.channels}"
                f"{instead}"
            )
    check_metrics_apply(config.validate_metrics, pixel_format, "validate_metrics: ")


def check_distillation(config: Config) -> None:
    """Checks the settings of a run with a teacher; a UserError names one that does not go with it."""
    loss = config.loss
    if not any(getattr(loss, name) for name in TEACHER_TERMS):
        names = ", ".join(f"loss.{name}" for name in TEACHER_TERMS)
        raise UserError(f"teacher needs a loss that compares with it: one of {names} must be above 0")
    for name, value, only in (
        ("model.kind", config.model.kind, "litevae"),
        ("model.encoder_type", config.model.encoder_type, "learned"),
        ("init_decoder", config.init_decoder, ""),
        ("freeze_encoder", config.freeze_encoder, False),
        # Equation 2 balances gradients of the decoder, which is frozen.
        ("loss.adversarial_weight", loss.adversarial_weight, "constant"),
    ):
        if value != only:
            allowed = str(only).lower() or "empty"
            raise UserError(f"{name} must be {allowed} with a teacher, got {str(value).lower()}")
    if loss.adversarial and not any(getattr(loss, name) for name in RECONSTRUCTION_TERMS):
        raise UserError(
            f"loss.adversarial needs a reconstruction loss beside it: one of {', '.join(RECONSTRUCTION_TERMS)} must "
            "be above 0"
        )


def check_freezing(config: Config) -> None:
    """Checks that something is trained, and that the adaptive weight has a layer; raises a UserError otherwise."""
    if config.freeze_encoder and config.freeze_decoder:
        raise UserError("freeze_encoder and freeze_decoder must not both be true: nothing would be trained")
    # Equation 2 balances gradients of the decoder.
    if config.freeze_decoder and config.loss.adversarial and config.loss.adversarial_weight != "constant":
        raise UserError(
            f"loss.adversarial_weight must be constant with freeze_decoder=true, got {config.loss.adversarial_weight}"
        )


def check_latent(config: Config) -> None:
    """Checks that the settings of the latent suit the encoder; a UserError names one that does not."""
    if config.latent.std is None:
        return
    for name, value, only in (
        ("model.encoder_type", config.model.encoder_type, "learned"),
        ("freeze_encoder", config.freeze_encoder, False),
        ("teacher", config.teacher, ""),
    ):
        if value != only:
            allowed = str(only).lower() or "empty"
            raise UserError(
                f"{name} must be {allowed} with latent.std, which changes the encoder, got {value}"
            )


def discriminator_start(config: Config) -> int:
    """Returns the first step in which the discriminator learns, from 1, if there is one."""
    start = config.discriminator.start
    return max(1, config.loss.adversarial_start if start is None else start)


def check_discriminator(config: Config) -> None:
    """Checks the settings of the discriminator; a UserError names those that do not fit together."""
    counts = max(1, config.loss.adversarial_start)
    if discriminator_start(config) > counts:
        raise UserError(
            f"discriminator.start must be loss.adversarial_start={counts} or less, got {config.discriminator.start}: "
            "the autoencoder would learn from a discriminator that has not learned anything"
        )
    if config.discriminator.r1 and config.discriminator.kind != "stylegan":
        raise UserError(
            f"discriminator.r1 must be 0 for discriminator.kind={config.discriminator.kind}, got "
            f"{config.discriminator.r1}: it is for stylegan"
        )


def check_gradient_ratio(config: Config) -> None:
    """Checks that the gradient ratio is measured at least once if it is asked for; raises a UserError otherwise."""
    every, first = config.gradient_ratio_every, max(1, config.loss.adversarial_start)
    if every and not config.loss.adversarial:
        raise UserError(
            "gradient_ratio_every measures the adversarial loss's gradient: loss.adversarial must be above 0"
        )
    if every and -(-first // every) * every > config.max_steps:
        raise UserError(
            f"gradient_ratio_every={every} never comes between loss.adversarial_start={first} and "
            f"max_steps={config.max_steps}"
        )


def check_stages(config: Config) -> None:
    """Checks the order of the stages, and their sizes and batches; raises a UserError for those that do not fit."""
    before = 1
    for index, stage in enumerate(config.stages):
        if stage.start <= before:
            raise UserError(f"stages[{index}].start must be above {before}, got {stage.start}")
        if config.model.aggregator == "vit" and stage.size not in (None, config.data.size):
            raise UserError(
                f"stages[{index}].size must be data.size, {config.data.size}, the only size that model.aggregator=vit "
                f"takes, got {stage.size}"
            )
        before = stage.start
    for listed in list_stages(config):
        check_batch_size(listed.batch_size, config.optimizer.accumulation)


def check_batch_size(
    batch_size: int, accumulation: int, processes: int = 1, name: str = "data.batch_size"
) -> None:
    """Checks that a batch can be shared evenly.

    Args:
        batch_size: samples per step, over all processes together.
        accumulation: number of parts in which each process works through its share.
        processes: number of processes.
        name: name of the setting, for the message.

    Raises:
        UserError: the batch cannot be shared evenly.
    """
    if batch_size % accumulation:
        raise UserError(f"optimizer.accumulation must divide the batch of {batch_size}, got {accumulation}")
    if batch_size % (accumulation * processes):
        raise UserError(
            f"{name} counts the samples of all processes: {batch_size} cannot be shared by {processes} processes "
            f"with optimizer.accumulation={accumulation}"
        )
