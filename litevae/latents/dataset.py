"""A dataset that reads the images of an encoded folder, and a sampler for batches of equal shape."""

import operator
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from litevae.data.paths import PackedStrings
from litevae.errors import UserError, shorten
from litevae.latents.index import INDEX, Shard, read_complete_index, read_images
from litevae.latents.shards import find_damage, tensor_name, verify


class Latent(NamedTuple):
    """An encoded image."""

    moments: Tensor  # (2 n_z, h, w) float32, for `sample_latents`
    label: int  # position in `LatentDataset.labels`; -1 without a label


class LatentBatch(NamedTuple):
    """Several encoded images."""

    moments: Tensor  # (N, 2 n_z, h, w) float32
    label: Tensor  # (N,) int64, as `Latent.label`


class LatentDataset(Dataset[Latent]):
    """The images of a folder that `litevae encode` has written.

    Mirrored copies follow the images: item i + `count` is the mirrored item i. An integer, which may be negative,
    selects a `Latent`. A slice, or a sequence or tensor of integers or of one boolean per item, selects a
    `LatentBatch`, if all items have the same shape. The files are mapped into memory, so that random access reads only
    the items themselves, also in worker processes.

    Args:
        folder: folder that `litevae encode` has written.
        mirrored: whether to include the mirrored copies, if there are any.
        check: whether to check the content of all files, which reads them once. Their lengths are always checked.

    Attributes:
        count: number of images.
        labels: names of the classes, in numerical order if all are whole numbers, else in alphabetical order.
        index: content of index.json.
        shape: shape (2 n_z, h, w) of every item; None if the images were encoded whole, so that it differs.

    Raises:
        UserError: the folder does not exist or is incomplete, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], mirrored: bool = True, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = verify(self.folder) if check else read_complete_index(self.folder)
        self.shards: list[Shard] = self.index["shards"]
        channels, *side = self.index["latents"]["shape"]
        self.shape: tuple[int, int, int] | None = None if None in side else (channels, *side)
        names: list[str] = []
        labels: list[str | None] = []
        ids: dict[tuple[int, int], int] = {}  # of the latents' heights and widths
        size_ids, rows = array("i"), array("i")  # per image, and its row in the tensor of its shape
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: {find_damage(self.folder, shard)}")
            try:
                with safe_open(path, framework="pt") as file:
                    listed = read_images(file, (channels, *side))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from None
            if len(listed) != shard.count:
                raise UserError(f"{path}: does not hold what {INDEX} says")
            names += [image.name for image in listed]
            labels += [image.label for image in listed]
            counts: dict[int, int] = {}
            for image in listed:
                number = ids.setdefault((image.height, image.width), len(ids))
                size_ids.append(number)
                rows.append(counts.get(number, 0))
                counts[number] = rows[-1] + 1
        self.sizes = list(ids)
        self.size_ids, self.rows = np.array(size_ids), np.array(rows)
        self.names = PackedStrings(names)
        known = {label for label in labels if label is not None}
        numeric = all(re.fullmatch(r"[+-]?\d{1,100}", label) for label in known)
        self.labels = sorted(known, key=(lambda label: (int(label), label)) if numeric else None)
        targets = {label: i for i, label in enumerate(self.labels)}
        self.targets = torch.tensor([-1 if label is None else targets[label] for label in labels])
        self.ends = torch.tensor([shard.count for shard in self.shards]).cumsum(0)
        self.count = len(self.names)
        self.copies = 2 if mirrored and self.index["encoding"]["mirror"] else 1
        self.files: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.count * self.copies

    @overload
    def __getitem__(self, index: int) -> Latent: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> LatentBatch: ...

    def __getitem__(self, index: Any) -> Latent | LatentBatch:
        numbers = self.resolve(index)
        if isinstance(numbers, int):
            return self.item(numbers)
        sizes = {self.sizes[self.size_ids[number % self.count]] for number in numbers}
        if len(sizes) > 1:
            shapes = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:5])
            raise ValueError(
                f"items of different shapes make no batch (ShapeBatchSampler finds batches): {shapes}"
            )
        items = [self.item(number) for number in numbers]
        empty = self.shape or (self.index["latents"]["shape"][0], 0, 0)
        moments = torch.stack([item.moments for item in items]) if items else torch.empty(0, *empty)
        return LatentBatch(moments, torch.tensor([item.label for item in items], dtype=torch.int64))

    def resolve(self, index: Any) -> int | Sequence[int]:
        """Returns the numbers of the items that `__getitem__` selects, each from 0.

        Raises:
            IndexError: an item does not exist, or a mask has another length.
            TypeError: `index` is of another type or has more dimensions.
        """
        if isinstance(index, slice):
            return range(len(self))[index]
        try:
            array = index.numpy(force=True) if isinstance(index, Tensor) else np.asarray(index)
        except Exception:  # a ragged list, or a tensor that NumPy has no equivalent of
            array = np.empty((0, 0))
        kind = array.dtype.kind
        if array.shape == (0,) and isinstance(index, list | tuple):  # float64 in NumPy
            return []
        if array.ndim == 0 and kind != "b":
            with suppress(TypeError):  # `index` is not a whole number
                return self.position(operator.index(index))
        if array.ndim == 1 and kind == "b":
            if len(array) != len(self):
                raise IndexError(f"a mask must have {len(self)} booleans, one per item, got {len(array)}")
            return [int(number) for number in np.flatnonzero(array)]
        if array.ndim == 1 and kind in "iu":
            return [self.position(number) for number in array.tolist()]
        raise TypeError(
            "an index must be a whole number, a slice, or a flat sequence or tensor of whole numbers or booleans, "
            f"got {shorten(index)}"
        )

    def position(self, number: int) -> int:
        """Returns the number of an item, counted from 0; `IndexError` if it does not exist."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {shorten(number)} of {len(self)}")
        return number % len(self)

    def item(self, number: int) -> Latent:
        copy, position = divmod(number, self.count)
        shard = int(torch.searchsorted(self.ends, position, right=True))
        if shard not in self.files:
            self.files[shard] = load_file(self.folder / self.shards[shard].file)
        size = self.sizes[self.size_ids[position]]
        tensor = self.files[shard][tensor_name(bool(copy), None if self.shape else size)]
        return Latent(tensor[int(self.rows[position])].float(), int(self.targets[position]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # each process maps the files itself

    def name(self, index: int) -> str:
        """Returns the image's name within the data that it was encoded from."""
        number = self.resolve(index)
        if not isinstance(number, int):
            raise TypeError(f"the index of a name must be a whole number, got {shorten(index)}")
        return self.names[number % self.count]

    def items_by_shape(self) -> dict[tuple[int, int, int], Tensor]:
        """Returns the numbers of the items of each shape (2 n_z, h, w), in int64, with mirrored copies at the end."""
        channels = self.index["latents"]["shape"][0]
        found = ((size, np.flatnonzero(self.size_ids == number)) for number, size in enumerate(self.sizes))
        return {
            (channels, *size): torch.from_numpy(
                np.concatenate([numbers + copy * self.count for copy in range(self.copies)])
            )
            for size, numbers in found
        }

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Calls `sample_latents` with the scaling and shift factors of the model that encoded the images."""
        latents = self.index["latents"]
        return sample_latents(moments, latents["scaling_factor"], latents["shift_factor"], generator)


class ShapeBatchSampler(Sampler[list[int]]):
    """Batches of items of one shape each, for a DataLoader's `batch_sampler`.

    Every iteration yields each item once; with `drop_last`, those that fill no batch are left out. The order depends
    on `seed` and on the number of the iteration, so that all processes of a distributed run get the same batches. To
    share them between the processes, use `drop_last`, and Accelerate or every n-th batch.

    Args:
        dataset: dataset of the items.
        batch_size: items per batch. The last batch of a shape has fewer.
        shuffle: whether to shuffle the items and the batches; otherwise the shapes come one after the other.
        drop_last: whether to leave out batches of fewer items.
        seed: seed of the order.

    Raises:
        ValueError: `batch_size` is not a whole number from 1, or `seed` none from 0.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, smallest in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"{name} must be a whole number from {smallest}, got {shorten(value)}")
        self.items = [numbers.numpy() for numbers in dataset.items_by_shape().values()]
        # NumPy's small integers would overflow.
        self.batch_size, self.shuffle, self.drop_last, self.seed = (
            int(batch_size),
            shuffle,
            drop_last,
            int(seed),
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the next iteration, such as when a run is resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum((len(each) + self.remainder) // self.batch_size for each in self.items)

    @property
    def remainder(self) -> int:
        return 0 if self.drop_last else self.batch_size - 1

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        batches = []
        for items in self.items:
            ordered = random.permutation(items) if self.shuffle else items
            stop = (len(items) + self.remainder) // self.batch_size * self.batch_size
            batches += [ordered[start : start + self.batch_size] for start in range(0, stop, self.batch_size)]
        order = random.permutation(len(batches)) if self.shuffle else range(len(batches))
        return (batches[number].tolist() for number in order)


def sample_latents(
    moments: Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draws a sample from each posterior and normalises it: (sample - shift_factor) * scaling_factor.

    Args:
        moments: posterior moments, (N, 2 n_z, h, w) float32.
        scaling_factor: factor of the model's configuration.
        shift_factor: shift of the model's configuration; None is 0.
        generator: generator of the noise, on the moments' device.
        noise: standard normal noise of the result's shape; None draws it with `generator`.

    Returns:
        Latents for a diffusion model, (N, n_z, h, w) float32.
    """
    posterior = DiagonalGaussianDistribution(moments)
    sample = posterior.sample(generator) if noise is None else posterior.mean + posterior.std * noise
    return (sample - (shift_factor or 0.0)) * scaling_factor
