"""Encoding a data set: images decoded by worker processes while the model encodes and a thread writes.

Several processes share the shards. They go in rounds of a batch each, in which they tell each other how far they
are, and whether to stop.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.sources import ImageSource
from litevae.errors import UserError
from litevae.latents.encoder import DTYPES
from litevae.latents.folder import LatentFolder, Settings, describe
from litevae.latents.processes import ProcessDied, Processes, error_message, locked, raise_first
from litevae.latents.shards import Shard
from litevae.latents.share import Share, times_of_all
from litevae.models.interface import Autoencoder
from litevae.signals import StopRequest

NOTICEABLE = 0.1  # share of the time that is worth a hint


@dataclass(frozen=True)
class Encoding:
    """What `encode_images` did.

    `total`: images in the data; `before`: those that earlier runs had done; `done`: those of this run; `bad`:
    those of all runs that cannot be read. `seconds`: from the first batch on; `encoder_seconds` of them in the
    model, `waited` for images and `waited_to_write` for the disk. `stopped_by`: the signal that ended the run
    early, else None. Of several processes, the images are those of all, `seconds` is the time of the slowest,
    and the other times are means over those that had images to encode.
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
) -> Encoding:
    """Writes the posteriors of all images to `folder`, as `litevae.latents.shards` describes.

    Goes on where an earlier run on the same folder, with the same model, images and settings, ended in whatever
    way; its shards are checked, and encoded again where they are damaged. On one machine the files do not
    depend on how often it was ended, nor on `workers`. SIGINT or SIGTERM ends the run after the current batch;
    what is encoded of a shard by then is kept, and the next run with the same batch size goes on behind it.
    After anything worse, the shard is encoded again.
    Images that cannot be read are left out and listed in bad_images.txt. Shows a progress bar on stderr.

    Under `torchrun` the processes share the shards, and all return the same. The files are those of one
    process; how many there are may change from run to run. A signal to one of them ends all, two batches later.

    Args:
        model: of 3 channels, on the device to run on. It is converted to the settings' precision, in place.
        batch_size: images at a time.
        workers: processes that decode images; 0: this one.
        max_bad_fraction: of the images that may be bad.
        compile: use `torch.compile` on the encoder.

    Raises:
        UserError: a size that the model does not take, a folder of something else or with other settings, or
            one that another run is writing to; too many images that cannot be read, or latents that are not
            finite. In all processes, whichever of them found it.
        OSError: the disk is full, for example, or another process has failed or died.
    """
    processes = Processes()
    try:
        with StopRequest() as stop, ExitStack() as until_end:
            if model.device.type == "cuda":  # events belong to the current device
                until_end.enter_context(torch.cuda.device(model.device))
            target = LatentFolder(folder, images, settings, batch_size, max_bad_fraction)
            open_folder(target, model, processes, until_end)
            # diffusers' own `to` warns about modules to keep in float32, and there are none
            torch.nn.Module.to(model, DTYPES[settings.precision])
            model.to(memory_format=torch.channels_last)
            model.eval()
            return encode_shards(model, target, workers, compile, processes, stop)
    finally:
        processes.close()


def open_folder(folder: LatentFolder, model: Autoencoder, processes: Processes, until_end: ExitStack) -> None:
    """Makes or continues the folder, and locks it until `until_end` closes.

    Raises:
        UserError: as `LatentFolder.begin`, or the processes differ in their models or images.
    """

    def begin() -> tuple[dict[str, Any], dict[int, Shard]]:
        folder.head = describe(model, folder.images, folder.settings)
        return folder.head, folder.begin(until_end)

    # The first process goes alone: only one prints what is wrong, and only one writes.
    first_head, folder.shards = processes.first_does(begin)
    if processes.index:
        folder.head = describe(model, folder.images, folder.settings)
        until_end.enter_context(locked(folder.path, processes.index))
    compared = ("model", "images", "encoding", "latents")
    same = [folder.head[name] for name in compared] == [first_head[name] for name in compared]
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
    """Encodes the shards that are missing, in rounds of one batch per process, and completes the index."""
    missing = [number for number in range(folder.count_shards()) if number not in folder.shards]
    bad_images = folder.list_bad()
    share = Share(model, folder, bad_images, missing[processes.index :: processes.count], workers, compile)
    kept = sum(processes.gather(sum(share.kept.values())))
    before = sum(shard.images for shard in folder.shards.values()) + kept
    done = finished = 0
    stopped = False
    failure: Exception | None = None
    # A line now and then is enough for a file or a pipe.
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(folder.images),
        initial=before,
        unit="image",
        mininterval=interval,
        disable=not missing or processes.index > 0,
    ) as bar:
        while finished < processes.count and not stopped:
            count = 0
            if failure is None:
                try:
                    count = share.step()
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
            bar.set_postfix_str(f"{share.waiting:.0%} waiting for images", refresh=False)
    try:
        share.finish(keep=failure is None or isinstance(failure, ProcessDied))
    except Exception as error:
        failure = failure or error
    if isinstance(failure, ProcessDied):
        raise failure
    reports = processes.gather((error_message(failure), share.shards, share.times(), stop.signal))
    raise_first([message for message, *_ in reports], failure)
    for _, shards, *_ in reports:
        folder.shards |= shards
    complete = len(folder.shards) == folder.count_shards()

    def finish() -> int:
        if complete:
            return folder.complete()
        bad_images.read()  # other processes may have found more
        return len(bad_images)

    bad = processes.first_does(finish)
    signals = [signal for *_, signal in reports if signal]
    seconds, encoder, waited, to_write = times_of_all([times for _, _, times, _ in reports])
    return Encoding(
        folder.path,
        len(folder.images),
        before,
        done,
        bad,
        seconds,
        encoder,
        waited,
        to_write,
        signals[0] if signals and not complete else None,
    )
