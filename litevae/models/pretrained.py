"""Loading of a LiteVAE from folders and files, and of other autoencoders' decoders into one."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin

from litevae.errors import UserError
from litevae.files import read_json
from litevae.models.checks import warn_of_two_scales
from litevae.models.weight_files import list_weights, read_weights
from litevae.models.weights import copy_weights, load_decoder


class PretrainedMixin(ModelMixin, ConfigMixin):
    """The methods of diffusers' models that load them, which refuse what is not a whole model of this class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Loads a model from a folder, or from a repository of the Hub, as `ModelMixin.from_pretrained` does.

        Raises:
            ValueError: the folder holds a model of another class, or weights that do not cover the model, or only a
                variant of the weights that is not asked for.
            OSError: there is no such folder, or it lacks a file.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        variants = list_weights(folder)
        if variants and None not in variants and kwargs.get("variant") is None:
            names = " or ".join(f"variant={name!r}" for name in variants)
            raise UserError(f"{folder}: holds only a variant of the weights: pass {names}")
        info_wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        if missing := sorted(info["missing_keys"]):
            rest = f" and {len(missing) - 1} others" if missing[1:] else ""
            raise ValueError(f"{folder}: its weights lack {missing[0]}{rest} of the model in its config.json")
        warn_of_two_scales(model.config)
        return (model, info) if info_wanted else model

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Returns a new model with random weights, as `ConfigMixin.from_config` does.

        Raises:
            ValueError: the configuration belongs to another class, such as `AutoencoderKL`.
        """
        if isinstance(config, Mapping):
            check_class(cls, config)
        return super().from_config(config, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads a model whose weights are in one file, in evaluation mode.

        Args:
            path: a .safetensors file, or a pickle of tensors.
            config: the model's config.json, its folder or its content; default: config.json beside the file.
            torch_dtype, dtype: dtype of the parameters; default: float32.

        Raises:
            ValueError: a file is missing or damaged, or the weights are not those of the configuration. The decoder of
                an AutoencoderKL is loaded by `load_decoder`.
        """
        path = Path(path)
        if not isinstance(config, Mapping):
            file = path.parent if config is None else Path(config)
            file = file / "config.json" if file.is_dir() else file
            try:
                config = read_json(file)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: the configuration {file} cannot be read: {error}") from None
            if not isinstance(config, Mapping):
                raise UserError(f"{file}: not a model's configuration")
        weights = read_weights(path, "from_single_file")
        if any(name.startswith("encoder.down_blocks.") for name in weights):
            raise UserError(
                f"{path} holds an AutoencoderKL: a {cls.__name__} takes its decoder with load_decoder"
            )
        model = cls.from_config(dict(config))
        copy_weights(model, weights, path, "from_single_file")
        # diffusers' own `to` warns about modules to keep in float32, and there are none.
        return torch.nn.Module.to(model, dtype or torch_dtype or torch.float32).eval()

    def load_decoder(self, path: str | os.PathLike[str]) -> None:
        """Copies the decoder of a Stable Diffusion VAE into this model, whose decoder must have the same architecture.

        A `post_quant_conv` is copied too if this model has one (`use_1x1_conv`).

        Args:
            path: folder of a diffusers model or pipeline, in any form that diffusers writes; or one file, .safetensors
                or .ckpt, of a VAE or a whole checkpoint, with diffusers' names or the original ones.

        Raises:
            ValueError: a file is missing or damaged, or holds no decoder or another one.
        """
        load_decoder(self, Path(path), "load_decoder")


def check_class(cls: type, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration belongs to another class than `cls`."""
    own = inspect.signature(cls).parameters
    foreign = [
        name for name in inspect.signature(AutoencoderKL).parameters if name in config and name not in own
    ]
    kind = config.get("_class_name")
    # A configuration without a class is a part of one, and a subclass has the settings of its base.
    unknown = (
        kind not in (None, *(base.__name__ for base in cls.__mro__)) and "extractor_channels" not in config
    )
    if foreign or unknown:
        has = f", which has {', '.join(foreign[:3])}" if foreign else ""
        kind = kind or "AutoencoderKL"
        raise UserError(
            f"the configuration is that of {kind}{has}, not of {cls.__name__}: load it with diffusers' {kind}, or its "
            "decoder into a LiteVAE with load_decoder (init_decoder in training)"
        )
