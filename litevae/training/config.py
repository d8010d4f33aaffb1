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

from litevae.errors import UserError
from litevae.losses import RECONSTRUCTION_TERMS, TERMS, LossConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class ModelConfig:
    """Arguments of `LiteVAE.from_preset`."""

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
    batch_size: int = 16  # crops a step and process
    crop: Literal["random", "random_resized", "native"] = "random"
    flip: bool = True  # mirrors half of the crops
    workers: int = 4  # processes that read images, for each process that trains; 0: none
    max_bad_fraction: float = 0.01  # of the images may be unusable; the run stops at more


@dataclass
class OptimizerConfig:
    """Adam. The paper's settings (Table 22): learning rate 1e-4, betas 0.5 and 0.9."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    warmup_steps: int = 0
    max_gradient_norm: float = 1.0  # clipped to; 0 for never


@dataclass
class Config:
    output_dir: str = "runs/train"
    seed: int = 0
    max_steps: int = 100_000
    log_every: int = 100  # steps between the lines of metrics.jsonl
    validate_every: int = 1000  # steps between measurements on the held-out photograph
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights stay in float32
    channels_last: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the file, then the overrides.

    Args:
        name: of a shipped configuration, or a path that ends in .yaml.
        overrides: such as "max_steps=20" or "data.size=64", in YAML's notation after the sign.

    Raises:
        UserError: no such configuration, broken YAML, an unknown key (the message names the nearest), or a
            value of the wrong type or out of range.
    """
    path = find_config(name)
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    config = OmegaConf.structured(Config)
    apply(config, loaded, f"{path}: ")

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
            OmegaConf.update(config, key, value)
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
        **{f"loss.{name}": 0 for name in TERMS},
        "loss.adversarial_start": 0,
    }
    for key, minimum in least.items():
        value = setting(config, key)
        if not minimum <= value < float("inf"):
            raise UserError(f"{key} must be {minimum} or more, got {value}")
    most = {"seed": 2**32 - 1, "max_steps": 10**9, "data.batch_size": 10**5, "optimizer.learning_rate": 1e6}
    for key, maximum in most.items():
        if setting(config, key) > maximum:
            raise UserError(f"{key} must be {maximum} or less, got {setting(config, key)}")
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
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise UserError(f"optimizer.betas must be at least 0 and below 1, got {list(config.optimizer.betas)}")
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")


def setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
