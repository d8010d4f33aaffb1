"""The folder of an encoded data set: its shards, its index, and a dataset that reads them.

`shard-00000.safetensors` and so on hold `moments` (N, 2 n_z, h, w) in float16, a posterior's mean and then its
log-variance in [-30, 20] for each image, where asked for `moments_mirrored` of the mirrored images, and as metadata
"images" a JSON list of [name, label]. `index.json` lists them, and says what they were made of and with. A shard is
of a fixed stretch of the data; images that could not be read are left out of it and listed in the index.

float16 holds every bfloat16 between 6e-5 and 65504 exactly, and a float32 to 11 bits.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from litevae.data.sources import PackedStrings
from litevae.errors import UserError
from litevae.files import replacing, sync_folder, write

FORMAT = "litevae latents, version 1"
INDEX = "index.json"
MOMENTS, MIRRORED, IMAGES = "moments", "moments_mirrored", "images"


@dataclass(frozen=True)
class Shard:
    """A file of latents, as the index lists it.

    The data's images `first` to `first` + `images` - 1 in their order, of which `count` are in it; `bad` has
    the names of the others, and why they could not be read.
    """

    file: str
    first: int
    images: int
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]


def name_shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def note_of(folder: Path, number: int) -> Path:
    """The file that says that shard `number` is complete, until the index does."""
    return folder / f".shard-{number:05d}.json"


def unfinished_of(folder: Path, number: int) -> Path:
    """The file with what a run that was stopped had encoded of shard `number`."""
    return folder / f".shard-{number:05d}.unfinished"


@dataclass(frozen=True)
class Unfinished:
    """The first images of a shard, as they are encoded.

    `moments` (1 or 2, N, 2 n_z, h, w) float16, the second the mirrored images'; also those of bad images,
    which `bad` lists by their number in the data. `labels` of all.
    """

    moments: Tensor
    labels: list[str | None]
    bad: dict[int, str]


def write_unfinished(folder: Path, number: int, identity: dict[str, Any], unfinished: Unfinished) -> None:
    """Writes a file for `read_unfinished` through to the disk: the SHA-256 of what follows, and a dict as
    `torch.save` writes it."""
    content = io.BytesIO()
    torch.save({"identity": identity, **vars(unfinished)}, content)
    with replacing(unfinished_of(folder, number)) as path:
        write(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    sync_folder(folder)


def read_unfinished(folder: Path, number: int, identity: dict[str, Any]) -> Unfinished | None:
    """What `write_unfinished` has written, or None if there is no such file.

    Raises:
        ValueError: it is damaged, or was written for another identity.
    """
    try:
        content = unfinished_of(folder, number).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its content is not what was written (SHA-256)")
    saved = torch.load(io.BytesIO(content), weights_only=True)
    if saved.pop("identity") != identity:
        raise ValueError("was left by a run with another --batch-size, or of something else")
    return Unfinished(**saved)


def write_shard(
    folder: Path,
    number: int,
    first: int,
    images: list[tuple[str, str | None]],
    tensors: dict[str, Tensor],
    bad: dict[str, str],
) -> Shard:
    """Writes a shard through to the disk, and then a note of it.

    Args:
        first: the number of its first image in the data.
        images: names and labels of those in it.
        tensors: `moments` and perhaps `moments_mirrored`.
        bad: names of the images left out, and why.
    """
    # one entry of metadata: safetensors writes several in no fixed order
    content = save(tensors, {IMAGES: json.dumps(images)})
    target = folder / name_shard(number)
    with replacing(target) as path:
        write(path, content)
    digest = hashlib.sha256(content).hexdigest()
    shard = Shard(target.name, first, len(images) + len(bad), len(images), len(content), digest, bad)
    with replacing(note_of(folder, number)) as path:
        write(path, json.dumps(asdict(shard)).encode())
    sync_folder(folder)
    return shard


def write_index(folder: Path, head: dict[str, Any], shards: Iterable[Shard]) -> None:
    """Writes index.json: `head`, and the shards if they are all there."""
    with replacing(folder / INDEX) as path:
        write(
            path,
            (json.dumps({**head, "shards": [asdict(each) for each in shards]}, indent=1) + "\n").encode(),
        )
    sync_folder(folder)


def read_head(folder: Path) -> dict[str, Any] | None:
    """What is in index.json, of a complete folder or not; None if there is no such file.

    Raises:
        UserError: not an index, or of another version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path}: is of format {index['format']!r}; this version reads {FORMAT!r}")
        index["shards"] = [Shard(**each) for each in index["shards"]]
        for name in ("complete", "model", "images", "encoding", "latents"):
            index[name]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the index of encoded images") from None
    return index


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a complete folder, with `Shard`s in "shards"; UserError if it is not one."""
    index = read_head(folder)
    if index is None:
        raise UserError(
            f"{folder}: {'has no index.json: not encoded images' if folder.is_dir() else 'no such folder'}"
        )
    if not index["complete"]:
        raise UserError(
            f"{folder}: not complete: the litevae encode command that began it goes on when run again"
        )
    return index


def read_note(folder: Path, number: int) -> Shard | None:
    """The shard that a run which did not end has completed, or None."""
    try:
        return Shard(**json.loads(note_of(folder, number).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def find_damage(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's bytes: missing, another length or other content; None if nothing is."""
    path = folder / shard.file
    try:
        if path.stat().st_size != shard.bytes:
            return f"has {path.stat().st_size} bytes, not {shard.bytes}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == shard.sha256 else "its content is not what was written (SHA-256)"


def verify(folder: Path) -> dict[str, Any]:
    """Checks an encoded data set as a whole: that it is complete, and the SHA-256 and tensors of each shard.

    Returns:
        index.json, with `Shard`s in "shards".

    Raises:
        UserError: the first thing that is wrong.
    """
    index = read_index(folder)
    shape = tuple(index["latents"]["shape"])
    names = {MOMENTS, *([MIRRORED] if index["encoding"]["mirror"] else [])}
    end = 0
    for shard in index["shards"]:
        damage, mend = find_damage(folder, shard), "the same litevae encode command mends it"
        if damage is None:
            mend = f"delete it, and {mend}"  # which looks at the bytes alone
            try:
                with safe_open(folder / shard.file, framework="pt") as file:
                    tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    found = {name: (each.get_dtype(), *each.get_shape()) for name, each in tensors.items()}
                    listed = len(json.loads(file.metadata()[IMAGES]))
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                damage = f"cannot be read: {error}"
            else:
                expected = dict.fromkeys(names, ("F16", shard.count, *shape))
                if found != expected or listed != shard.count:
                    damage = f"does not hold what {INDEX} says"
        if damage is None and (shard.first != end or shard.count + len(shard.bad) != shard.images):
            damage = f"is listed in {INDEX} with numbers that do not fit"
        if damage is not None:
            raise UserError(f"{folder / shard.file}: {damage}; {mend}")
        end += shard.images
    if end != index["images"]["count"]:
        raise UserError(f"{folder / INDEX}: lists {end} of {index['images']['count']} images")
    return index


class Latent(NamedTuple):
    """An encoded image: `moments` (2 n_z, h, w) in float32, for `sample_latents`, and the number of its label in
    `LatentDataset.labels`, -1 if it has none."""

    moments: Tensor
    label: int


class LatentDataset(Dataset[Latent]):
    """The images of a folder that `litevae encode` has written.

    Where mirrored copies were encoded, they follow: item i + `count` is the mirrored item i, unless `mirrored` is
    False. The files are mapped into memory, so that items in any order cost what they hold, also in worker
    processes.

    Attributes: `count` of images; `labels`, the names of the classes, in numerical order if they are numbers,
    else in alphabetical; `index`, what is in index.json.

    Args:
        folder: of `litevae encode`.
        mirrored: also the mirrored copies, if there are any.
        check: the content of all files against the index, which reads them once. Their lengths are checked
            in any case.

    Raises:
        UserError: no such folder, one that is not complete, or a file that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], mirrored: bool = True, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = verify(self.folder) if check else read_index(self.folder)
        self.shards: list[Shard] = self.index["shards"]
        names: list[str] = []
        labels: list[str | None] = []
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: {find_damage(self.folder, shard)}")
            with safe_open(path, framework="pt") as file:
                for name, label in json.loads(file.metadata()[IMAGES]):
                    names.append(name)
                    labels.append(label)
        self.names = PackedStrings(names)
        known = {label for label in labels if label is not None}
        numbers = all(label.isdecimal() for label in known)
        self.labels = sorted(known, key=(lambda label: (int(label), label)) if numbers else None)
        number = {label: i for i, label in enumerate(self.labels)}
        self.targets = torch.tensor([-1 if label is None else number[label] for label in labels])
        self.ends = torch.tensor([shard.count for shard in self.shards]).cumsum(0)
        self.count = len(self.names)
        self.copies = 2 if mirrored and self.index["encoding"]["mirror"] else 1
        self.files: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.count * self.copies

    def __getitem__(self, index: int) -> Latent:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        copy, place = divmod(index, self.count)
        number = int(torch.searchsorted(self.ends, place, right=True))
        if number not in self.files:
            self.files[number] = load_file(self.folder / self.shards[number].file)
        row = place - int(self.ends[number]) + self.shards[number].count
        moments = self.files[number][MIRRORED if copy else MOMENTS][row]
        return Latent(moments.float(), int(self.targets[place]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # each process maps them itself

    def name(self, index: int) -> str:
        """The image's name within the data it was encoded from."""
        return self.names[index % self.count]

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`sample_latents` with the scale and shift of the model that encoded."""
        latents = self.index["latents"]
        return sample_latents(moments, latents["scaling_factor"], latents["shift_factor"], generator)


def sample_latents(
    moments: Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """A draw from each posterior, as diffusion models take it: (sample - shift_factor) * scaling_factor.

    Args:
        moments: (N, 2 n_z, h, w), float32.
        scaling_factor, shift_factor: of the model's configuration.
        generator: of the noise, on the moments' device.
        noise: standard normal of the result's shape, instead of what the generator draws.

    Returns:
        (N, n_z, h, w), float32.
    """
    posterior = DiagonalGaussianDistribution(moments)
    sample = posterior.sample(generator) if noise is None else posterior.mean + posterior.std * noise
    return (sample - (shift_factor or 0.0)) * scaling_factor
