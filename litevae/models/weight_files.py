"""Reading weights from diffusers' folders in every form, from single files, and in Stable Diffusion's original layout.

All of it is read as tensors alone: nothing in a file is executed.
"""

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from litevae.errors import UserError, shorten
from litevae.files import read_json, why_missing
from litevae.models.layers import OLD_ATTENTION_NAMES

WEIGHTS = "diffusion_pytorch_model.safetensors"

# diffusion_pytorch_model[.VARIANT].FORMAT, or diffusion_pytorch_model.FORMAT.index[.VARIANT].json: its parts.
# Old versions of diffusers put the variant before "index".
SINGLE = re.compile(r"diffusion_pytorch_model(?:\.(?!.*-\d{5}-of-)([^.]+))?\.(safetensors|bin)")
INDEX = re.compile(r"diffusion_pytorch_model\.(safetensors|bin)(?:\.([^.]+))?\.index(?:\.([^.]+))?\.json")

ORIGINAL_DECODER = re.compile(r"(?:first_stage_model\.|vae\.)?decoder\.up\.(\d+)\.block\.")


def list_weights(folder: Path) -> dict[str | None, dict[tuple[str, bool], Path]]:
    """Returns the weights in the folder of a diffusers model, as `group_weights` does."""
    return group_weights(folder.iterdir() if folder.is_dir() else ())


def group_weights(paths: Iterable[Path]) -> dict[str | None, dict[tuple[str, bool], Path]]:
    """Finds the weights among the files of a diffusers model.

    Returns:
        For each variant, such as "fp16", or None for the weights without one: the paths by format, "safetensors" or
        "bin", and by whether the file is the index of parts.
    """
    found: dict[str | None, dict[tuple[str, bool], Path]] = {}
    for path in sorted(paths):
        if match := SINGLE.fullmatch(path.name):
            found.setdefault(match[1], {})[match[2], False] = path
        elif match := INDEX.fullmatch(path.name):
            found.setdefault(match[2] or match[3], {})[match[1], True] = path
    return found


def find_weights(folder: Path, variant: str | None = None) -> tuple[Path, str | None]:
    """Returns the file with the weights in the folder of a diffusers model, or the index of its parts.

    Safetensors are preferred to pickles, and the weights without a variant to the others.

    Args:
        folder: path of the folder.
        variant: variant to take; default: none, or the only one.

    Returns:
        The path, and the variant or None.

    Raises:
        UserError: there are no weights, only several variants, or not the one asked for.
    """
    found = list_weights(folder)
    if not found:
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: {why_missing(folder, 'file or folder')}")
        raise UserError(f"{folder / WEIGHTS}: no such file")
    if variant is not None and variant not in found:
        raise UserError(without_variant(folder, variant, found))
    if variant is None and None not in found:
        if len(found) > 1:
            raise UserError(
                f"{folder}: holds the weights of several variants ({name_variants(found)}): give the path of one file"
            )
        variant = next(iter(found))
    forms = found[variant]
    return next(
        forms[form, parts]
        for form in ("safetensors", "bin")
        for parts in (False, True)
        if (form, parts) in forms
    ), variant


def name_variants(variants: Iterable[str | None]) -> str:
    return ", ".join(sorted(str(each) for each in variants if each is not None))


def without_variant(folder: Path, variant: str, found: Iterable[str | None]) -> str:
    """Returns the message for a folder or repository that has other variants of the weights only."""
    only = name_variants(found) or "those without one"
    return f"{folder}: holds no weights of variant {shorten(variant)}, only {only}"


def weight_files(path: Path) -> list[Path]:
    """Returns the files of weights that `find_weights` returned, which are several if it is an index.

    Raises:
        UserError: the index is damaged, or a file is missing or not a regular one.
    """
    files = read_index(path) if path.suffix == ".json" else [path]
    for file in files:
        check_regular(file)
    return files


def check_regular(path: Path) -> None:
    """Raises UserError unless `path` is a regular file: a FIFO would block, and a device may have no end."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {why_missing(path, 'file')}")


def read_weights(source: Path, setting: str) -> dict[str, Tensor]:
    """Reads the weights in a file, or in the folder of a diffusers model, with the names that diffusers uses now.

    Args:
        source: a folder as `find_weights` takes it; or one file, .safetensors or a pickle of tensors (.bin, .ckpt,
            .pt, .pth). A file may have the layout of the original Stable Diffusion, and be a whole checkpoint.
        setting: name of the setting that gave the source, for error messages.

    Raises:
        UserError: a file is missing or damaged, or holds other objects than tensors. The message begins with
            `setting`.
    """
    try:
        path = find_weights(source)[0] if source.is_dir() or not source.suffix else source
        weights: dict[str, Tensor] = {}
        for part in weight_files(path):
            weights |= read_tensors(part)
        return with_current_names(weights)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


def read_index(path: Path) -> list[Path]:
    """Returns the files that the index of a model in parts lists."""
    try:
        names = set(read_json(path)["weight_map"].values())
        parts = [path.parent / name for name in sorted(names)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: not an index of weights") from None
    for part in parts:
        if part.parent != path.parent:
            raise UserError(
                f"{path}: lists {shorten(os.path.relpath(part, path.parent))}, which is not a file beside it"
            )
    return parts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        raise UserError(
            f"{path}: cannot be read: it is damaged, or holds other objects than tensors; save it as safetensors"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # a checkpoint of PyTorch Lightning
    tensors = content.items() if isinstance(content, Mapping) else ()
    weights = {name: x for name, x in tensors if isinstance(name, str) and isinstance(x, Tensor)}
    if not weights:
        raise UserError(f"{path}: holds no tensors with names")
    return weights


def with_current_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights with diffusers' names, from the original layout or with old names of attentions."""
    blocks = [int(match[1]) for name in weights if (match := ORIGINAL_DECODER.match(name))]
    if blocks:
        types = [""] * (max(blocks) + 1)  # only their number is used
        weights = convert_ldm_vae_checkpoint(weights, {"down_block_types": types, "up_block_types": types})
    new = {old: name for name, old in OLD_ATTENTION_NAMES.items()}
    attention = re.compile(rf"(.*attentions\.\d+\.)({'|'.join(new)})(\.weight|\.bias)")
    return {
        match[1] + new[match[2]] + match[3] if (match := attention.fullmatch(name)) else name: tensor
        for name, tensor in weights.items()
    }
