"""Checks of the arguments of autoencoders, which may come from anybody's config.json.

They limit what is built before anything is built. The constructors check what depends on several arguments.
"""

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from litevae.errors import shorten

WIDEST = 2**16  # channels
LONGEST = 16  # entries of a list of widths: an image has at most 2^16 pixels per latent pixel's side
TYPICAL = (1, WIDEST)

# By argument of `LiteVAE`, `AutoencoderKL` or `SmallEncoderVAE`, its range.
WHOLE_NUMBERS = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), (1, 4096)),
    **dict.fromkeys(("extractor_channels", "aggregator_channels", "sample_size"), TYPICAL),
    **dict.fromkeys(("encoder_num_groups", "num_groups", "norm_num_groups"), TYPICAL),
    "layers_per_block": (1, 64),
    "finest_level": (1, LONGEST),
}
# By argument, the range of each entry.
LISTS = {
    **dict.fromkeys(("block_out_channels", "encoder_block_out_channels"), TYPICAL),
    **dict.fromkeys(("extractor_multipliers", "aggregator_multipliers"), (1, 1024)),
}
FLAGS = (
    *("use_1x1_conv", "shared_extractor", "force_upcast"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
)
NUMBERS = ("scaling_factor", "shift_factor")
NUMBERS_PER_CHANNEL = ("latents_mean", "latents_std")
LARGEST = 1e30  # of a number, because latents are float32
NAMES = ("down_block_types", "up_block_types")  # of AutoencoderKL, one per block

MODULES = ("encoder", "decoder", "quant_conv", "post_quant_conv")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the types and ranges of an autoencoder's arguments.

    Args:
        arguments: arguments by name; others than those of autoencoders are ignored.

    Raises:
        ValueError: an argument has another type, or is out of range. The message names it.
    """
    # Imports PyTorch, which `litevae --help` need not wait for.
    from litevae.data.pixels import is_value_range

    for name, value in arguments.items():
        if name in WHOLE_NUMBERS and not is_whole(value, *WHOLE_NUMBERS[name]):
            smallest, largest = WHOLE_NUMBERS[name]
            raise ValueError(
                f"{name} must be a whole number from {smallest} to {largest}, got {shorten(value)}"
            )
        if name in LISTS and not (
            is_list(value)
            and 1 <= len(value) <= LONGEST
            and all(is_whole(each, *LISTS[name]) for each in value)
        ):
            smallest, largest = LISTS[name]
            raise ValueError(
                f"{name} must be 1 to {LONGEST} whole numbers from {smallest} to {largest}, got {shorten(value)}"
            )
        if name in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {shorten(value)}")
        if name in NUMBERS and not (value is None or is_number(value)):
            raise ValueError(f"{name} must be a number, got {shorten(value)}")
        if name in NUMBERS_PER_CHANNEL and not (
            value is None or (is_list(value) and 1 <= len(value) <= 4096 and all(map(is_number, value)))
        ):
            raise ValueError(f"{name} must be one number per latent channel, got {shorten(value)}")
        if name == "value_range" and not (value is None or is_value_range(value)):
            raise ValueError(
                f"value_range must be null or two numbers, the lower first, got {shorten(value)}"
            )
        if name == "scaling_factor" and not value:
            raise ValueError(f"scaling_factor must be a number other than 0, got {shorten(value)}")
        if name == "act_fn" and not isinstance(value, str):
            raise ValueError(f"{name} must be the name of an activation, such as silu, got {shorten(value)}")
        if name in NAMES and not (is_list(value) and all(isinstance(each, str) for each in value)):
            raise ValueError(f"{name} must be a list of names, got {shorten(value)}")
    for name in NUMBERS_PER_CHANNEL:
        value = arguments.get(name)
        if value is None:
            continue
        channels = arguments.get("latent_channels", len(value))
        if len(value) != channels:
            raise ValueError(
                f"{name} must be {channels} numbers, one per latent channel, got {len(value)}: {shorten(value)}"
            )
        if name == "latents_std" and min(value) <= 0:
            raise ValueError(f"{name} must be positive numbers, got {shorten(value)}")
    for name in NAMES:
        blocks = len(arguments.get("block_out_channels", (64,)))
        if len(arguments.get(name, ("",) * blocks)) != blocks:
            raise ValueError(f"{name} must have {blocks} entries, as many as block_out_channels")


def check_config(config: Any, model: type) -> None:
    """Checks the content of a model's config.json.

    Args:
        config: content of the file.
        model: class of the model.

    Raises:
        ValueError: it is not a mapping, an argument is of another type or out of range, or an entry would hide a
            part of the model or ask for what is not supported. The message names it.
    """
    if not isinstance(config, dict):
        raise ValueError("not a model's configuration")
    own = inspect.signature(model).parameters
    for name in config:
        if name not in own and (name in MODULES or name == "quantization_config" or hasattr(model, name)):
            raise ValueError(f"{shorten(name)} is not a setting of {model.__name__}")
    check_arguments({"latent_channels": own["latent_channels"].default, **config})


def is_whole(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and smallest <= int(value) <= largest


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
