"""Loading of autoencoders from folders and files, and of other autoencoders' decoders into one."""

import errno
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from huggingface_hub import ModelCard, file_exists, list_repo_files, try_to_load_from_cache

from litevae.errors import LONGEST_VALUE, UserError, one_line
from litevae.files import ADDRESS, why_missing
from litevae.models.card import README, for_repository, make_card, read_card
from litevae.models.checks import warn_of_two_scales
from litevae.models.loading import read_config
from litevae.models.weight_files import (
    WEIGHTS,
    find_weights,
    group_weights,
    list_weights,
    read_weights,
    weight_files,
    without_variant,
)
from litevae.models.weights import SAME_DECODER, advice, copy_weights, explain_shapes, load_decoder

CONFIG = "config.json"
# The arguments of `from_pretrained` that say where on the Hub a file is, and how to get it.
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")


class PretrainedMixin(ModelMixin, ConfigMixin):
    """The methods of diffusers' models that load and save them.

    They refuse to load anything but a whole model of this class, and save a model with its card.
    """

    _card: ModelCard | None = None

    @property
    def card(self) -> ModelCard:
        """The model card, which `save_pretrained` and `push_to_hub` write as README.md.

        It is the one in the folder that the model was loaded from, or else a new one. Edit it before you share the
        model: ``model.card.data.license = "apache-2.0"``.
        """
        if self._card is None:
            self._card = make_card(cast(Any, self))
        return self._card

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves the model and its card to a folder, as `ModelMixin.save_pretrained` does.

        A README.md that is in the folder already stays as it is.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        file = Path(save_directory, README)
        if is_main_process and file.parent.is_dir() and not file.exists():
            self.card.save(file)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        """Uploads a folder for `push_to_hub`, with the model's card unless the repository has a README.md."""
        if not subfolder and not file_exists(repo_id, README, token=token):
            Path(working_dir, README).write_text(for_repository(self.card, repo_id), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, token, commit_message, create_pr, subfolder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Loads a model from a folder, or from a repository of the Hub, as `ModelMixin.from_pretrained` does.

        With ``ignore_mismatched_sizes=True``, weights that have another shape in the folder are those of a new model,
        with a warning that names them.

        Raises:
            ValueError: the folder holds a model of another class, or weights that do not cover or do not fit the model
                or are not regular files, or only a variant of the weights that is not asked for.
            OSError: there is no such folder or repository, or it lacks a file.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        info_wanted = kwargs.pop("output_loading_info", False)
        path = None if kwargs.get("use_flashpack") else cls._check_folder(folder, kwargs)
        try:
            if not folder.is_dir():
                named = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
                check_class(cls, cls.load_config(pretrained_model_name_or_path, **named), folder)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if path is None and "does not appear to have a file named" in str(error):
                raise explain_missing(folder, pretrained_model_name_or_path, kwargs) from None
            raise
        except (ValueError, RuntimeError) as error:
            if path is None and not kwargs.get("use_flashpack"):
                path = cached_weights(pretrained_model_name_or_path, kwargs)
            own = inspect.signature(cls).parameters
            changes = {name: value for name, value in kwargs.items() if name in own}
            if (
                path is None
                or isinstance(error, UserError)
                or not (reason := explain_shapes(cls, {**read_config(path.parent / CONFIG), **changes}, path))
            ):
                raise
            raise UserError(f"{folder}: {reason}, or pass ignore_mismatched_sizes=True") from None
        if missing := sorted(info["missing_keys"]):
            rest = f" and {len(missing) - 1} others" if missing[1:] else ""
            raise UserError(f"{folder}: its weights lack {missing[0]}{rest} of the model in its config.json")
        if info["mismatched_keys"]:
            fill_mismatched(model, [name for name, _, _ in info["mismatched_keys"]])
        warn_of_two_scales(model.config)
        try:
            model._card = read_card(folder)
        except ValueError as error:
            warnings.warn(f"{error}: the model gets a new one", stacklevel=2)
        return (model, info) if info_wanted else model

    @classmethod
    def _check_folder(cls, folder: Path, kwargs: dict[str, Any]) -> Path | None:
        """Checks the files in a local folder before diffusers reads them, and says in `kwargs` which ones to read.

        Returns:
            The path of the weights, as `find_weights` returns it; None if there is no such folder.
        """
        refuse_address(folder)
        if folder.is_file():
            raise UserError(f"{folder}: is a file, not a model folder: load it with from_single_file")
        if not folder.is_dir():
            return None
        if (folder / "model_index.json").is_file() and not (folder / CONFIG).exists():
            raise UserError(f"{folder}: holds a whole pipeline: pass subfolder='vae'")
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / CONFIG))
        check_class(cls, read_config(folder / CONFIG), folder)
        found, variant = list_weights(folder), kwargs.get("variant")
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / WEIGHTS))
        if None not in found and variant is None:
            raise UserError(ask_for_variant(folder, found))
        path = find_weights(folder, variant)[0]
        weight_files(path)
        if kwargs.get("use_safetensors") is None:  # diffusers would report that it looks for both
            kwargs["use_safetensors"] = ".safetensors" in path.name
        return path

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """Returns a new model with random weights, as `ConfigMixin.from_config` does.

        Raises:
            ValueError: the configuration belongs to another class, such as `AutoencoderKL`.
        """
        given = kwargs.get("pretrained_model_name_or_path", config)  # diffusers still takes a path
        if given is not None:
            if not isinstance(given, Mapping):
                folder = Path(given, kwargs.get("subfolder") or "")
                refuse_address(folder)
                file = folder / CONFIG if folder.is_dir() else folder
                given = read_config(file) if file.exists() else cls.load_config(given, **kwargs)
            check_class(cls, given)
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
        if not os.path.isfile(path):
            raise UserError(f"{os.fspath(path)}: {why_missing(path, 'file')}")
        path = Path(path)
        if not isinstance(config, Mapping):
            file = Path(path.parent if config is None else config)
            file = file / CONFIG if config is None or file.is_dir() else file
            if not os.path.isfile(file):
                reason = why_missing(config or file, "file")
                raise UserError(f"{path}: its configuration is missing: {config or file}: {reason}")
            config = read_config(file)
        weights = read_weights(path, "from_single_file")
        if not issubclass(cls, AutoencoderKL) and any(n.startswith("encoder.down_blocks.") for n in weights):
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


def refuse_address(path: Path) -> None:
    """Raises UserError if a path is an address, which diffusers would take for the name of a repository."""
    if ADDRESS.match(str(path)) and not path.exists():
        raise UserError(
            f"{path}: an address, not a local folder or the name of a repository, such as USER/NAME"
        )


def cached_weights(repository: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path | None:
    """Returns the path of a repository's weights in the Hub's cache, as `find_weights` does; None without them.

    Args:
        repository: name of the repository.
        kwargs: arguments of `from_pretrained`.
    """
    options = {name: kwargs[name] for name in ("cache_dir", "revision") if kwargs.get(name) is not None}
    file = "/".join(filter(None, (kwargs.get("subfolder"), CONFIG)))
    try:
        config = try_to_load_from_cache(str(repository), file, **options)
        return (
            find_weights(Path(config).parent, kwargs.get("variant"))[0] if isinstance(config, str) else None
        )
    except ValueError:  # there is no such name, or there are no such weights
        return None


def ask_for_variant(folder: Path, variants: Iterable[str | None]) -> str:
    """Returns the message for a model that has only variants of its weights."""
    names = " or ".join(f"variant={name!r}" for name in variants)
    return f"{folder}: holds only a variant of the weights: pass {names}"


def explain_missing(
    folder: Path, repository: str | os.PathLike[str], kwargs: Mapping[str, Any]
) -> UserError | OSError:
    """Returns the error for a repository of the Hub that lacks the files that `from_pretrained` needs.

    Args:
        folder: the repository and the subfolder, for the message.
        repository: name of the repository.
        kwargs: arguments of `from_pretrained`.
    """
    variant = kwargs.get("variant")
    if found := list_variants_on_hub(str(repository), **kwargs):
        return UserError(
            ask_for_variant(folder, found) if variant is None else without_variant(folder, variant, found)
        )
    return OSError(
        f"{folder}: holds no {CONFIG} with {WEIGHTS} or .bin beside it: for a variant of the weights pass "
        "variant='fp16', and for a part of a pipeline subfolder='vae'"
    )


def list_variants_on_hub(
    repo_id: str,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **_: Any,
) -> list[str | None]:
    """Returns the variants of a model's weights in a repository of the Hub; none if the Hub does not say."""
    if local_files_only:
        return []
    try:
        paths = map(Path, list_repo_files(repo_id, revision=revision, token=token))
    except Exception:  # diffusers has reported the same, or there is no network
        return []
    return list(group_weights(path for path in paths if path.parent == Path(subfolder or "")))


def fill_mismatched(model: ModelMixin, names: Iterable[str]) -> None:
    """Gives a model the named weights of a new one; diffusers has said which, and left them without values."""
    fresh = type(model).from_config(model.config).state_dict()
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    for name in names:
        owner, _, attribute = name.rpartition(".")
        weight = torch.nn.Parameter(fresh[name].to(device, model.dtype))
        setattr(model.get_submodule(owner), attribute, weight)


def check_class(cls: type, config: Mapping[str, Any], source: Path | None = None) -> None:
    """Checks that a configuration belongs to a class.

    Args:
        cls: class of the model.
        config: content of its config.json.
        source: folder of the configuration, for the message.

    Raises:
        UserError: it belongs to another class. The message says which one, how to load it, and whether a LiteVAE can
            use its decoder.
    """
    own, theirs = (inspect.signature(each).parameters for each in (cls, AutoencoderKL))
    extends = issubclass(cls, AutoencoderKL)
    distinctive = ("encoder_block_out_channels" if extends else "extractor_channels") in config
    # The configuration of a class that extends AutoencoderKL records its settings too.
    foreign = [
        name for name in theirs if name in config and name not in own and not (extends and distinctive)
    ]
    kind = config.get("_class_name") or config.get("model_type")  # the latter is of transformers
    # A configuration without a class is a part of one, and a subclass has the settings of its base.
    family = [base.__name__ for base in cls.__mro__ if issubclass(base, PretrainedMixin)]
    unknown = kind not in (None, *family) and not distinctive
    if not (foreign or unknown):
        return
    kind = one_line(kind or "AutoencoderKL", LONGEST_VALUE)
    has = f", which has {', '.join(foreign[:3])}" if foreign and kind in SAME_DECODER else ""
    where = "" if source is None else f"{source}: "
    raise UserError(f"{where}the configuration is that of {kind}{has}, not of {cls.__name__}: {advice(kind)}")
