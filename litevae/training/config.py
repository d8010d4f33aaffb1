"""The typed configuration of a training run, read from YAML and `key=value` overrides."""

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from litevae.discriminators import DiscriminatorConfig
from litevae.errors import UserError
from litevae.losses import RECONSTRUCTION_TERMS, TERMS, LossConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class ModelConfig:
    """LiteVAE, or one of the paper's baselines with the same decoder.

    `preset`, `decoder_norm` and `output_type` are LiteVAE's alone; `use_1x1_conv` is quant_conv and
    post_quant_conv in Stable Diffusion's VAE.
    """

    kind: Literal["litevae", "sd-vae", "vae-small"] = "litevae"
    preset: str = "litevae-b"
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    num_groups: int = 32
    decoder_norm: Literal["group", "smc"] = "group"
    output_type: Literal["image", "wavelet"] = "image"
    use_1x1_conv: bool = False


@dataclass
class DataConfig:
    """Images to train and to validate on.

    `train` is a folder of images, searched through all its folders; WebDataset shards on local disks, as a
    folder, a file or a pattern such as "train-{000..146}.tar"; a folder that Hugging Face's `save_to_disk`
    has written; .parquet files with a column of images; or "demo", scikit-image's photographs.
    `validation` is another of these; empty, it is the demo's held-out photograph for the demo and none
    otherwise.

    `crop` says how an image becomes a square. random: a square of the shorter side's length at a random
    place, resized (as in the code of Esser et al., arXiv:2012.09841; the paper does not say).
    random_resized: torchvision's RandomResizedCrop, a window of 8 % to 100 % of the image with sides of 3:4
    to 4:3. native: a square of `size` at a random place, not resized; smaller images count as bad.
    """

    train: str = "demo"
    validation: str = ""
    validation_count: int = 64  # images measured on, at most
    size: int = 256  # side of the square crops, in pixels
    batch_size: int = 16  # crops a step, of all processes together
    crop: Literal["random", "random_resized", "native"] = "random"
    flip: bool = True  # mirrors half of the crops
    workers: int = 4  # processes that read images, for each process that trains; 0: none
    max_bad_fraction: float = 0.01  # of the images may be unusable; the run stops at more


@dataclass
class StageConfig:
    """From step `start` on (the first is 1), crops of this size, and as many a step."""

    start: int = 1
    size: int | None = None  # as before
    batch_size: int | None = None  # as before


@dataclass
class OptimizerConfig:
    """AdamW, without weight decay Adam. The paper's settings (Appendix F): learning rate 1e-4, betas 0.5 and 0.9."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    warmup_steps: int = 0
    max_gradient_norm: float = 1.0  # clipped to; 0 for never
    accumulation: int = 1  # parts that a step's batch is worked through in, to save memory


@dataclass
class AdversaryConfig(DiscriminatorConfig):
    """The discriminator, for loss.adversarial above 0. Its optimizer has the autoencoder's settings but for:"""

    learning_rate: float | None = None  # optimizer.learning_rate
    betas: tuple[float, float] | None = None  # optimizer.betas


@dataclass
class CheckpointConfig:
    """One every so many steps, at the end, and after each validation (`validate_every`) with the highest PSNR so
    far: at most one for a step. The last `keep` and the best are kept."""

    every: int = 1000  # steps; 0 for none at all
    keep: int = 2


@dataclass
class Config:
    output_dir: str = "runs/train"
    seed: int = 0
    max_steps: int = 100_000
    log_every: int = 100  # steps between the lines of metrics.jsonl
    validate_every: int = 1000  # steps between measurements on the validation images
    # steps between measurements of the adversarial gradient against the reconstruction's (Figure 7), which
    # cost two more backward passes each; 0 for none
    gradient_ratio_every: int = 0
    max_bad_steps: int = 10  # so many steps in a row with a loss or gradient that is not finite end the run
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; weights stay in float32
    channels_last: bool = True
    compile: bool = False
    ema_decay: float = 0.9999  # at most (1 + n) / (10 + n) at the n-th step; 0 for no averaged model
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    resume: str = ""  # auto: from the newest checkpoint in output_dir, if any; or a checkpoint's folder
    init: str = ""  # a model, a run or a checkpoint to take the first weights from
    init_decoder: str = ""  # a diffusers AutoencoderKL to take the decoder's first weights from
    freeze_encoder: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = field(default_factory=list)  # what changes after data.size, data.batch_size
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last` of a run, counted from 1. `first_sample` is the number of crops before it."""

    first: int
    last: int
    size: int
    batch_size: int
    first_sample: int


def list_stages(config: Config) -> list[Stage]:
    """The run's stages in order; each ends where the next begins, the last with `max_steps`."""
    settings = [StageConfig(1, config.data.size, config.data.batch_size), *config.stages]
    result: list[Stage] = []
    size, batch_size, sample = config.data.size, config.data.batch_size, 0
    for index, stage in enumerate(settings):
        size, batch_size = stage.size or size, stage.batch_size or batch_size
        following = settings[index + 1].start if index + 1 < len(settings) else config.max_steps + 1
        last = min(following - 1, config.max_steps)
        if stage.start <= last:
            result.append(Stage(stage.start, last, size, batch_size, sample))
            sample += (last - stage.start + 1) * batch_size
    return result


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the file, then the overrides.

    A file with `extends: NAME` replaces settings of the configuration NAME.

    Args:
        name: of a shipped configuration, or a path that ends in .yaml.
        overrides: such as "max_steps=20" or "data.size=64", in YAML's notation after the sign.

    Raises:
        UserError: no such configuration, broken YAML, an unknown key (the message names the nearest), or a
            value of the wrong type or out of range.
    """
    path = find_config(name)
    config = OmegaConf.structured(Config)
    for file, settings in reversed(read_files(path)):
        apply(config, settings, f"{file}: ")

    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r} is not a setting: write key=value, such as max_steps=20")
        if key not in KEYS:
            raise UserError(unknown_key(key))
        try:
            apply(config, OmegaConf.from_dotlist([override]), f"{override}: ")
        except (YAMLError, OmegaConfBaseException):
            raise UserError(f"{override}: {key} must be {expected(key)}") from None

    try:
        result = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation to nowhere
        raise UserError(f"{path}: {one_line(error)}") from None
    check(result)
    return result


def read_files(path: Path) -> list[tuple[Path, Any]]:
    """The file's settings, then those of the file that it `extends`, and so on."""
    files: list[tuple[Path, Any]] = []
    following: str | None = str(path)
    while following is not None:
        path = find_config(following)
        if path in [file for file, _ in files]:
            raise UserError(f"{path}: extends itself")
        try:
            settings = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
        following = settings.pop("extends", None) if isinstance(settings, DictConfig) else None
        files.append((path, settings))
    return files


def find_config(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        return path
    if name not in shipped_configs():
        nearest = difflib.get_close_matches(name, shipped_configs(), n=1, cutoff=0.0)[0]
        raise UserError(
            f"no configuration named {name!r}: did you mean {nearest!r}? "
            f"(there are: {', '.join(shipped_configs())}; or give the path of a .yaml file)"
        )
    return CONFIGS / f"{name}.yaml"


def apply(config: DictConfig, settings: Any, where: str) -> None:
    """Sets each of `settings` in `config`; UserError, beginning with `where`, for one that does not fit."""
    if not isinstance(settings, DictConfig):
        raise UserError(f"{where}must be a mapping of settings")
    # one at a time: OmegaConf's own errors do not always say which key they are about
    for key, value in leaves(OmegaConf.to_container(settings, resolve=False)):
        if key not in KEYS:
            raise UserError(where + unknown_key(key))
        try:
            # YAML takes nothing after the sign for null
            OmegaConf.update(config, key, "" if value is None and KEYS[key] is str else value)
        except OmegaConfBaseException:
            raise UserError(f"{where}{key} must be {expected(key)}") from None


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, down to where the sections of `Config` end."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and is_dataclass(KEYS.get(key)):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def all_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key under a dataclass with its type, sections included."""
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        yield prefix + entry.name, hints[entry.name]
        if is_dataclass(hints[entry.name]):
            yield from all_keys(cast(type, hints[entry.name]), f"{prefix}{entry.name}.")


KEYS: dict[str, Any] = dict(all_keys(Config))


def unknown_key(key: str) -> str:
    """The message for a key that does not exist, with the most similar one that does."""

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        # a right name without its section, or in the wrong one
        leaf = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.95 * leaf)

    return f"unknown setting {key!r}: did you mean {max(KEYS, key=similarity)!r}?"


def expected(key: str) -> str:
    """What may stand behind `key=`, in words."""
    kind = KEYS[key]
    if is_dataclass(kind):
        return f"set key by key, such as {key}.{fields(kind)[0].name}=..."
    return in_words(kind)


def in_words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return in_words(args[0])
    if kind is StageConfig:
        return "with the settings " + ", ".join(entry.name for entry in fields(StageConfig))
    if origin is list and args[0] is StageConfig:
        return f"a list such as [{{start: 100001, size: 256}}], each {in_words(StageConfig)}"
    if origin is Literal:
        return " or ".join(args)
    if origin is list:
        return f"a list such as [1,2], each {in_words(args[0])}"
    if origin is tuple:
        return f"{len(args)} values such as [{','.join('0.5' for _ in args)}], each {in_words(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind]


def check(config: Config) -> None:
    """UserError for a value that has the right type but makes no sense."""
    least = {
        "max_steps": 1,
        "seed": 0,
        "log_every": 1,
        "validate_every": 1,
        "gradient_ratio_every": 0,
        "data.size": 16,
        "data.batch_size": 1,
        "data.validation_count": 1,
        "data.workers": 0,
        "data.max_bad_fraction": 0,
        "model.latent_channels": 1,
        "model.layers_per_block": 1,
        "model.num_groups": 1,
        "optimizer.learning_rate": 0,
        "optimizer.weight_decay": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.max_gradient_norm": 0,
        "optimizer.accumulation": 1,
        "max_bad_steps": 1,
        "ema_decay": 0,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
        **{f"loss.{name}": 0 for name in TERMS},
        "loss.adversarial_start": 0,
    }
    for key, minimum in least.items():
        value = setting(config, key)
        if not minimum <= value < float("inf"):
            raise UserError(f"{key} must be {minimum} or more, got {value}")
    most = {
        "model.latent_channels": 4096,
        "seed": 2**32 - 1,
        "max_steps": 10**9,
        "data.batch_size": 10**5,
        "optimizer.learning_rate": 1e6,
    }
    for key, maximum in most.items():
        if setting(config, key) > maximum:
            raise UserError(f"{key} must be {maximum} or less, got {setting(config, key)}")
    if config.ema_decay >= 1:
        raise UserError(f"ema_decay must be below 1, got {config.ema_decay}")
    if config.gradient_ratio_every and not config.loss.adversarial:
        raise UserError(
            "gradient_ratio_every measures the adversarial loss's gradient: loss.adversarial must be above 0"
        )
    if config.loss.ldl and not config.ema_decay:
        raise UserError("loss.ldl compares with the averaged model: ema_decay must be above 0")
    rate = config.discriminator.learning_rate
    if rate is not None and not 0 <= rate <= 1e6:
        raise UserError(f"discriminator.learning_rate must be between 0 and 1e6, got {rate}")
    check_stages(config)
    if config.model.kind != "litevae":
        for name, allowed in (("decoder_norm", "group"), ("output_type", "image")):
            if getattr(config.model, name) != allowed:
                raise UserError(f"model.{name} must be {allowed} for model.kind={config.model.kind}")
    if config.data.max_bad_fraction >= 1:
        raise UserError(f"data.max_bad_fraction must be below 1, got {config.data.max_bad_fraction}")
    if min(config.model.block_out_channels, default=0) < 1:
        raise UserError(
            f"model.block_out_channels must all be 1 or more, got {config.model.block_out_channels}"
        )
    if not any(getattr(config.loss, name) for name in RECONSTRUCTION_TERMS):
        raise UserError(
            f"every reconstruction loss ({', '.join(RECONSTRUCTION_TERMS)}) has weight 0: "
            "there is nothing to train for"
        )
    for name, betas in (("optimizer", config.optimizer.betas), ("discriminator", config.discriminator.betas)):
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"{name}.betas must be at least 0 and below 1, got {list(betas)}")
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")


def check_stages(config: Config) -> None:
    """UserError for stages that are not in order, and for sizes and batches that make no sense."""
    before = 1
    for index, stage in enumerate(config.stages):
        if stage.start <= before:
            raise UserError(f"stages[{index}].start must be above {before}, got {stage.start}")
        if stage.size is not None and stage.size < 16:
            raise UserError(f"stages[{index}].size must be 16 or more, got {stage.size}")
        if stage.batch_size is not None and not 1 <= stage.batch_size <= 10**5:
            raise UserError(f"stages[{index}].batch_size must be 1 to 100000, got {stage.batch_size}")
        before = stage.start
    parts = config.optimizer.accumulation
    for batch_size in (stage.batch_size for stage in list_stages(config)):
        if batch_size % parts:
            raise UserError(f"optimizer.accumulation must divide the batch of {batch_size}, got {parts}")


def setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
