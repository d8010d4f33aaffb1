"""`litevae encode`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from litevae.errors import UserError
from litevae.loading import load_model

if TYPE_CHECKING:
    import torch

    from litevae.latents import Encoding


def check_folder(folder: Path | None) -> None:
    if folder is None:
        return
    from litevae.latents import verify

    index = verify(folder)
    shards = index["shards"]
    images, bad = sum(shard.count for shard in shards), sum(len(shard.bad) for shard in shards)
    print(
        f"{folder}: {images} images in {len(shards)} shards, {bad} bad images left out; all as it was written"
    )
    raise typer.Exit


def encode(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Folder of a model, of a training run, or of a diffusers AutoencoderKL."
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Folder of images, .tar shards, or what else data.train may be."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the latents.")],
    size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of the middle square.  [default: the model's sample_size]"),
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Encode each image mirrored, too.")] = False,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(help="auto: bf16 on GPUs, and CPUs with AVX512-BF16 or AMX; else fp32."),
    ] = "auto",
    shard_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images in a file.")] = 1024,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images at a time.  [default: 32 on a GPU, 8 on a CPU]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Processes that decode images.  [default: a core each, 16 at most]"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Such as cuda:1 or cpu.  [default: the GPU if there is one]"),
    ] = None,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Of the images that may be unreadable.")
    ] = 0.01,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder: a minute, then faster.")
    ] = False,
    _: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            callback=check_folder,
            is_eager=True,
            metavar="OUT",
            help="Check the files of an encoded folder instead.",
        ),
    ] = None,
) -> None:
    """Encode a data set, for training diffusion models.

    \b
    Example: litevae encode runs/imagenet-b path/to/images latents --mirror
             litevae encode --verify latents

    Writes the mean and log-variance of each image's latent, not a sample, as float16 to
    shard-00000.safetensors and so on, and index.json, which lists the shards with their SHA-256 and says
    which model, images and settings they are of. litevae.latents.LatentDataset reads them.

    The same command goes on where one was ended, by Ctrl-C or in any other way; it encodes damaged files again
    and refuses other settings. Images that cannot be read are left out and listed in bad_images.txt.
    """
    autoencoder = load_model(model)

    import torch

    from litevae.latents import Settings, encode_images
    from litevae.latents.encode import choose_precision
    from litevae.training.sources import open_images

    place = choose_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, 16) if workers is None else workers
    chosen = choose_precision(place) if precision == "auto" else precision
    settings = Settings(autoencoder.config.sample_size if size is None else size, chosen, mirror, shard_size)
    batch_size = batch_size or (8 if place.type == "cpu" else 32)
    try:
        result = encode_images(
            autoencoder.to(place),
            open_images(data),
            output,
            settings,
            batch_size,
            workers,
            max_bad_fraction,
            compile,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"{batch_size} images at a time do not fit {place}'s memory: lower --batch-size"
        ) from None
    report(result, place, workers, cores)
    if autoencoder.config.scaling_factor == 1:
        print(
            "this model's scaling_factor is 1: litevae scale measures it, and the same command then notes it"
        )


def choose_device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # PyTorch asserts that it was built with the device's code
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name}: {reason}") from None
    return device


def report(result: "Encoding", device: "torch.device", workers: int, cores: int) -> None:
    if result.done:
        print(
            f"{result.done} images in {result.seconds:.1f} s: {result.done / result.seconds:.1f} images/s; "
            f"the encoder itself: {result.done / result.encoder_seconds:.1f} images/s on {device}"
        )
        share = f"{result.waited / result.seconds:.0%} of the time"
        if result.bottleneck == "decoding images":
            more = (
                f"more --workers than {workers} may help" if workers < cores else f"all {cores} cores decode"
            )
            hint = f"decoding images (waited for them {share}): {more}"
        elif result.bottleneck == "writing":
            hint = f"writing (waited for it {result.waited_to_write / result.seconds:.0%} of the time)"
        else:
            hint = f"the encoder (waited for images {share})"
        print(f"bottleneck: {hint}")
    if result.bad:
        print(f"{result.bad} images cannot be read: {result.folder / 'bad_images.txt'} lists them")
    if result.stopped_by:
        encoded = result.before + result.done
        print(
            f"stopped by {result.stopped_by}; {encoded} of {result.total} images are encoded: the same command goes on"
        )
    elif result.done:
        print(f"{result.folder}: all {result.total - result.bad} images are encoded")
    else:
        print(f"{result.folder}: complete already, and undamaged: {result.total - result.bad} images")
