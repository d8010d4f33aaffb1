"""Encoding of a data set: worker processes decode images while the model encodes and a thread writes.

Several processes divide the shards between them. They run in rounds of one batch each, in which they exchange their
progress and whether to stop.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.sources import ImageSource
from litevae.environment import DTYPES
from litevae.errors import UserError, WorkerDied
from litevae.latents.folder import COMMAND, LatentFolder, Settings, make_header
from litevae.latents.index import Part, Shard
from litevae.latents.processes import ProcessDied, Processes, error_message, raise_first
from litevae.latents.shard_encoder import ShardEncoder, combine_times
from litevae.lock import locked
from litevae.memory import check_batch
from litevae.models.interface import Autoencoder, check_images
from litevae.signals import StopRequest

NOTICEABLE = 0.1  # fraction of the time from which waiting counts as a bottleneck


@dataclass(frozen=True)
class Encoding:
    """The outcome of `encode_images`.

    With several processes, the images are those of all, `seconds` is the time of the slowest, and the other times are
    means over the processes that had images to encode.

    Attributes:
        folder: folder of the encoded data set.
        total: images in the data, or in the range to encode.
        before: images that earlier runs had encoded.
        done: images that this run has encoded.
        bad: images that cannot be used, of all runs.
        seconds: time from the first batch on.
        encoder_seconds: time in the model.
        waited: time spent waiting for images.
        waited_to_write: time spent waiting for the disk.
        stopped_by: name of the signal that ended the run early, or None.
    """

    folder: Path
    total: int
    before: int
    done: int
    bad: int
    seconds: float
    encoder_seconds: float
    waited: float
    waited_to_write: float
    stopped_by: str | None

    @property
    def bottleneck(self) -> Literal["decoding images", "writing", "the encoder"]:
        """The part of the run that limits its speed."""
        if self.waited >= max(NOTICEABLE * self.seconds, self.waited_to_write):
            return "decoding images"
        return "writing" if self.waited_to_write >= NOTICEABLE * self.seconds else "the encoder"


def encode_images(
    model: Autoencoder,
    images: ImageSource,
    folder: Path,
    settings: Settings,
    batch_size: int = 8,
    workers: int = 4,
    max_bad_fraction: float = 0.01,
    compile: bool = False,
    part: Part | None = None,
) -> Encoding:
    """Writes the posteriors of all images to `folder`, in the format that `litevae.latents.shards` describes.

    A run continues an earlier one on the same folder, with the same model, images and settings, however that ended.
    It checks the existing shards and encodes damaged ones again. On one machine the files depend neither on the
    number of interruptions nor on `workers`. SIGINT or SIGTERM ends the run after the current batch. The encoded
    images of an unfinished shard are then kept for the next run with the same batch size; after any other end, the
    shard is encoded again. Images that cannot be used are left out and listed in bad_images.txt. A progress bar
    appears on stderr.

    Under `torchrun` the processes divide the shards between them, and all return the same result. The files are those
    of a single process, and the number of processes may change from run to run. A signal to one process ends all of
    them, two batches later.

    Args:
        model: autoencoder on the device to run on. It is converted to the settings' precision, in place.
        images: source of the images.
        folder: folder to write to.
        settings: settings of the encoded data set.
        batch_size: images per batch, or fewer of those that have more pixels than a square of `settings.size`.
        workers: number of processes that decode images; 0 decodes in this one.
        max_bad_fraction: fraction of the images that may be unusable: unreadable, or longer than 4:1 where whole
            images are encoded.
        compile: whether to compile the encoder with `torch.compile`.
        part: range of the shards to encode, for several computers without communication; `merge_parts` joins their
            folders. None encodes all.

    Raises:
        UserError: the model does not take such images, or images of these sizes; a batch exceeds the memory; the
            folder has other content or other settings, or another run writes to it; too many images cannot be used; or
            a latent is not finite. All processes raise the error of any one of them.
        WorkerDied: a process that decodes images was killed, or crashed. The encoded images are kept.
        OSError: a file cannot be written, or another process has failed or died.
    """
    check_images(model, images)
    check_batch(
        min(batch_size, len(images)), settings.size, model.config.in_channels, model.device.type, "batch size"
    )
    processes = Processes()
    try:
        with StopRequest() as stop, ExitStack() as until_end:
            if model.device.type == "cuda":  # events belong to the current device
                until_end.enter_context(torch.cuda.device(model.device))
            target = LatentFolder(folder, images, settings, batch_size, max_bad_fraction, part)
            open_latent_folder(target, model, processes, until_end)
            # diffusers' own `to` warns about modules to keep in float32, although there are none
            torch.nn.Module.to(model, DTYPES[settings.precision])
            model.to(memory_format=torch.channels_last)
            model.eval()
            return encode_shards(model, target, workers, compile, processes, stop)
    finally:
        processes.close()


def open_latent_folder(
    folder: LatentFolder, model: Autoencoder, processes: Processes, until_end: ExitStack
) -> None:
    """Creates or continues the folder, and locks it until `until_end` closes.

    Raises:
        UserError: `LatentFolder.begin` fails, or the processes have different models or images.
    """

    def begin() -> tuple[dict[str, Any], dict[int, Shard]]:
        folder.header = make_header(model, folder.images, folder.settings, folder.part)
        return folder.header, folder.begin(until_end)

    # The first process goes ahead, so that only one prints warnings and only one writes.
    first_header, folder.shards = processes.first_does(begin)
    if processes.index:
        folder.header = make_header(model, folder.images, folder.settings, folder.part)
        until_end.enter_context(locked(folder.path, COMMAND, processes.index))
    compared = ("model", "images", "encoding", "latents")
    same = [folder.header[name] for name in compared] == [first_header[name] for name in compared]
    if not all(processes.gather(same)):
        raise UserError("the processes have different models or images, or computers of different precision")


@torch.inference_mode()
def encode_shards(
    model: Autoencoder,
    folder: LatentFolder,
    workers: int,
    compile: bool,
    processes: Processes,
    stop: StopRequest,
) -> Encoding:
    """Encodes the missing shards, in rounds of one batch per process, and completes the index."""
    missing = [number for number in folder.numbers if number not in folder.shards]
    bad_images = folder.open_bad_images()
    numbers = missing[processes.index :: processes.count]
    encoder = ShardEncoder(model, folder, bad_images, numbers, workers, compile)
    kept = sum(processes.gather(sum(encoder.kept.values())))
    before = sum(shard.images for shard in folder.shards.values()) + kept
    done = finished = 0
    stopped = False
    failure: Exception | None = None
    interval = 0.5 if sys.stderr.isatty() else 10  # fewer lines in a file or a pipe
    with tqdm(
        total=folder.count_images(),
        initial=before,
        unit="image",
        mininterval=interval,
        disable=not missing or processes.index > 0,
    ) as bar:
        while finished < processes.count and not stopped:
            count = 0
            if failure is None:
                try:
                    count = encoder.step()
                except Exception as error:
                    failure = error
            try:
                ends = bool(stop.signal) or failure is not None
                images, finished, ending = processes.add([count, count == 0, ends])
                stopped = ending > 0
                if stopped or finished == processes.count:
                    images += sum(each for each, *_ in processes.finish())
            except ProcessDied as error:
                stopped, images, failure = True, 0, failure or error
            done += images
            bar.update(images)
            bar.set_postfix_str(f"{encoder.waiting_fraction:.0%} waiting for images", refresh=False)
    try:
        encoder.finish(keep=failure is None or isinstance(failure, ProcessDied | WorkerDied))
    except Exception as error:
        failure = failure or error
    if isinstance(failure, ProcessDied):
        raise failure
    reports = processes.gather((error_message(failure), encoder.shards, encoder.times(), stop.signal))
    raise_first([message for message, *_ in reports], failure)
    for _, shards, *_ in reports:
        folder.shards |= shards
    complete = len(folder.shards) == len(folder.numbers)

    def finish() -> int:
        if complete:
            return folder.complete()
        bad_images.read()  # other processes may have found more
        return len(bad_images)

    bad = processes.first_does(finish)
    signals = [signal for *_, signal in reports if signal]
    times = combine_times([times for _, _, times, _ in reports])
    return Encoding(
        folder=folder.path,
        total=folder.count_images(),
        before=before,
        done=done,
        bad=bad,
        seconds=times.total,
        encoder_seconds=times.encoder,
        waited=times.waited,
        waited_to_write=times.waited_to_write,
        stopped_by=signals[0] if signals and not complete else None,
    )
