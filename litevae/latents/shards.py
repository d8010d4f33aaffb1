"""The shards of an encoded data set.

Each shard, `shard-00000.safetensors` and so on, holds `moments` (N, 2 n_z, h, w) in float16: per image the posterior's
mean, then its log-variance in [-30, 20]. It optionally holds `moments_mirrored` of the mirrored images. Its metadata
"images" is a JSON list of [name, label]. `index.json` lists the shards and records the model, the images and the
settings. A shard covers a fixed range of the data; images that could not be used are left out of it and listed in the
index.

If the latents have several shapes (version 2 of the format), a shard holds a tensor per shape, such as `moments_32x48`
and `moments_mirrored_32x48`, each with its images in their order. The metadata list all images in their order, each as
[name, label, h, w].

float16 holds every bfloat16 between 6e-5 and 65504 exactly, and a float32 to 11 bits.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from litevae.errors import UserError
from litevae.files import open_regular, replacing, sha256, sync_folder, write
from litevae.latents.index import (
    IMAGES,
    INDEX,
    ImageEntry,
    Shard,
    is_count,
    is_text,
    marker_path,
    name_shard,
    read_complete_index,
    read_images,
)

MOMENTS, MIRRORED = "moments", "moments_mirrored"
CHANGED = "its content is not what was written (SHA-256)"


def tensor_name(mirrored: bool, size: tuple[int, int] | None) -> str:
    """Returns the name of a tensor in a shard; `size` is the latents' height and width if there are several."""
    name = MIRRORED if mirrored else MOMENTS
    return name if size is None else f"{name}_{size[0]}x{size[1]}"


def unfinished_path(folder: Path, number: int) -> Path:
    """Returns the path of the file with the images of shard `number` that a stopped run had encoded."""
    return folder / f".shard-{number:05d}.unfinished"


@dataclass(frozen=True)
class Unfinished:
    """The images of a shard that were encoded when a run was stopped. Images are named by their numbers in the data.

    Attributes:
        moments: per shape, (1 or 2, N, 2 n_z, h, w) float16, the second of the mirrored images.
        numbers: per shape, the numbers of the N images. Middle squares include bad images, which are black.
        labels: labels of all encoded images.
        bad: bad images, with the reasons.
    """

    moments: list[Tensor]
    numbers: list[list[int]]
    labels: dict[int, str | None]
    bad: dict[int, str]

    @property
    def done(self) -> set[int]:
        """The numbers of the images that need not be read again."""
        return {*self.labels, *self.bad}


def write_unfinished(folder: Path, number: int, identity: dict[str, Any], unfinished: Unfinished) -> None:
    """Writes a file for `read_unfinished` and flushes it to the disk.

    The file holds the SHA-256 of the rest, followed by a dict in the format of `torch.save`.
    """
    content = io.BytesIO()
    torch.save({"identity": identity, **vars(unfinished)}, content)
    with replacing(unfinished_path(folder, number)) as path:
        write(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    sync_folder(folder)


def read_unfinished(folder: Path, number: int, identity: dict[str, Any]) -> Unfinished | None:
    """Reads the file that `write_unfinished` has written; None if it does not exist.

    Raises:
        ValueError: the file is damaged, or was written for another identity.
    """
    try:
        with open_regular(unfinished_path(folder, number)) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(CHANGED)
    unusable = "is not a file that this version of litevae encode has written"
    try:
        saved = torch.load(io.BytesIO(content), weights_only=True)
        written_for = saved.pop("identity")
    except Exception:  # the unpickler can raise almost anything, with advice that does not apply
        raise ValueError(unusable) from None
    if written_for != identity:
        raise ValueError("was left by a run with another --batch-size, or of something else")
    try:
        unfinished = Unfinished(**saved)
        copies = 1 + identity["encoding"]["mirror"]
        pairs = list(zip(unfinished.moments, unfinished.numbers, strict=True))
        numbers = [number for numbers in unfinished.numbers for number in numbers]
        fits = all(
            (
                all(each.dtype == torch.float16 and each.ndim == 5 for each, _ in pairs),
                all(each.shape[:2] == (copies, len(numbers)) for each, numbers in pairs),
                sorted(numbers) == sorted(unfinished.labels),
                all(label is None or is_text(label) for label in unfinished.labels.values()),
                all(is_count(number) for number in (*numbers, *unfinished.bad)),
                all(is_text(reason) for reason in unfinished.bad.values()),
            )
        )
    except Exception:  # of values of any types
        fits = False
    if not fits:
        raise ValueError(unusable)
    return unfinished


def write_shard(
    folder: Path,
    number: int,
    first: int,
    images: Sequence[ImageEntry | tuple[str, str | None]],
    tensors: dict[str, Tensor],
    bad: dict[str, str],
) -> Shard:
    """Writes a shard and then its completion marker, and flushes both to the disk.

    Args:
        folder: folder of the encoded data set.
        number: number of the shard.
        first: number in the data of the shard's first image.
        images: images in the shard in their order, with or without their shapes as the folder's format requires.
        tensors: moments under the names of `tensor_name`.
        bad: names of the images that are left out, with the reasons.
    """
    # The metadata have a single entry, because safetensors writes several in no fixed order.
    content = save(tensors, {IMAGES: json.dumps(images)})
    target = folder / name_shard(number)
    with replacing(target) as path:
        write(path, content)
    digest = hashlib.sha256(content).hexdigest()
    shard = Shard(target.name, first, len(images) + len(bad), len(images), len(content), digest, bad)
    with replacing(marker_path(folder, number)) as path:
        write(path, json.dumps(asdict(shard)).encode())
    sync_folder(folder)
    return shard


def find_damage(folder: Path, shard: Shard) -> str | None:
    """Returns the reason why a shard's file is unusable (missing, wrong length or content), or None."""
    path = folder / shard.file
    try:
        if path.stat().st_size != shard.bytes:
            return f"has {path.stat().st_size} bytes, not {shard.bytes}"
        digest = sha256(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == shard.sha256 else CHANGED


def verify(folder: Path, part: bool = False) -> dict[str, Any]:
    """Checks that an encoded data set is complete, and the SHA-256 and the tensors of each shard.

    Args:
        folder: folder that `litevae encode` has written.
        part: whether the folder may hold a range of the shards only.

    Returns:
        Content of index.json, with `Shard`s in "shards".

    Raises:
        UserError: the message names the first fault.
    """
    index = read_complete_index(folder, part)
    end, count = 0, index["images"]["count"]
    if index.get("part"):
        size = index["encoding"]["shard_size"]
        shards = index["part"].shards(-(-count // size))
        end, count = shards.start * size, min(shards.stop * size, count)
    for shard in index["shards"]:
        damage, remedy = find_damage(folder, shard), "the same litevae encode command repairs it"
        if damage is None:
            remedy = f"delete it, and {remedy}"  # the command checks only the bytes
            try:
                with safe_open(folder / shard.file, framework="pt") as file:
                    tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    found = {name: (each.get_dtype(), *each.get_shape()) for name, each in tensors.items()}
                    images = read_images(file, index["latents"]["shape"])
            except (SafetensorError, OSError, ValueError) as error:
                damage = f"cannot be read: {error}"
            else:
                if found != expected_tensors(index, images) or len(images) != shard.count:
                    damage = f"does not hold what {INDEX} says"
        if damage is None and (shard.first != end or shard.count + len(shard.bad) != shard.images):
            damage = f"is listed in {INDEX} with numbers that do not fit"
        if damage is not None:
            raise UserError(f"{folder / shard.file}: {damage}; {remedy}")
        end += shard.images
    if end != count:
        raise UserError(f"{folder / INDEX}: lists {end} of {count} images")
    return index


def expected_tensors(index: dict[str, Any], images: Sequence[ImageEntry]) -> dict[str, tuple[str | int, ...]]:
    """Returns the dtype and shape of each tensor of a shard with these images, by name."""
    channels, *side = index["latents"]["shape"]
    copies = (False, True) if index["encoding"]["mirror"] else (False,)
    if side != [None, None]:
        return {tensor_name(copy, None): ("F16", len(images), channels, *side) for copy in copies}
    counts = Counter((image.height, image.width) for image in images)
    return {
        tensor_name(copy, size): ("F16", count, channels, *size)
        for size, count in counts.items()
        for copy in copies
    }
