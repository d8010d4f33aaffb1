"""`litevae encode`."""

import glob
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand

from litevae.cli.common import WorkersOption, choose_device, choose_workers, cores_per_process
from litevae.errors import UserError, shorten
from litevae.models.loading import load_model

if TYPE_CHECKING:
    import torch

    from litevae.latents import Encoding, Part
    from litevae.latents.encoder import Precision


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_folder(folder: Path | None) -> None:
    if folder is None:
        return
    from litevae.latents import verify

    index = verify(folder, part=True)
    print_contents(folder, index)
    raise typer.Exit


def print_contents(folder: Path, index: dict[str, Any]) -> None:
    shards, part = index["shards"], index.get("part")
    images, bad = sum(shard.count for shard in shards), sum(len(shard.bad) for shard in shards)
    print(
        f"{folder}: {f'range {part}, ' if part else ''}{plural(images, 'image')} in {plural(len(shards), 'shard')}, "
        f"{plural(bad, 'bad image')} left out; all files are intact"
    )


def parse_part(text: str | None) -> "Part | None":
    """Returns the range that --range names; `UserError` if it is none."""
    if text is None:
        return None
    from litevae.latents import Part

    found = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(
            f"--range {shorten(text)}: must be i/n with i from 0 to n-1, such as 0/8 to 7/8 for 8 computers"
        )
    return Part(int(found[1]), int(found[2]))


class EncodeCommand(TyperCommand):
    """`litevae encode`, or with --merge its form that takes any number of folders instead of MODEL DATA OUT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--merge" in args and not ctx.resilient_parsing and not {"--help", "--verify"} & set(args):
            folders = [arg for arg in args if arg != "--merge"]
            if option := next((each for each in folders if each.startswith("-")), None):
                raise UserError(f"--merge: takes folders only, and no option {shorten(option)}")
            from litevae.latents import merge_parts

            # A shell that finds no match, or a program without a shell, leaves a pattern as it is.
            found = [path for folder in folders for path in (sorted(glob.glob(folder)) or [folder])]
            print_contents(*merge_parts([Path(path) for path in found]))
            raise typer.Exit
        return super().parse_args(ctx, args)


def encode(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Folder of a model, of a training run, or of a diffusers AutoencoderKL."
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder of images, .tar shards, or any other source that data.train takes."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the latents.")],
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Side that images are resized to.  [default: the model's sample_size]"
        ),
    ] = None,
    crop: Annotated[
        Literal["middle", "shorter", "area"],
        typer.Option(
            help="middle: the middle square. shorter, area: the whole image, whose shorter side becomes --size, or "
            "whose area becomes that of a square of --size."
        ),
    ] = "middle",
    bucket_step: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="With shorter and area, round sides down to a multiple of this.  [default: the model's factor f]",
        ),
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Also encode each image mirrored.")] = False,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(help="auto: bf16 where the GPU or CPU multiplies it, otherwise fp32."),
    ] = "auto",
    shard_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images per file.")] = 1024,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images per batch.  [default: 32 on a GPU, 8 on a CPU]"),
    ] = None,
    workers: WorkersOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Device such as cuda:1 or cpu.  [default: one GPU per process, otherwise the CPU]",
        ),
    ] = None,
    max_bad_fraction: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="FRACTION", help="Fraction of the images that may be unusable."),
    ] = 0.01,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder: takes a minute, then runs faster.")
    ] = False,
    range_: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="I/N",
            help="Encode only range I (from 0) of N disjoint ranges of the files, each to its own OUT.",
        ),
    ] = None,
    __: Annotated[
        bool, typer.Option("--merge", help="Only join the folders of all ranges: encode --merge OUT/*")
    ] = False,
    _: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            callback=check_folder,
            is_eager=True,
            metavar="OUT",
            help="Only check the files of an encoded folder.",
        ),
    ] = None,
) -> None:
    """Encode a data set, for training diffusion models or for litevae distill.

    \b
    Example: litevae encode runs/imagenet-b path/to/images latents --mirror
             torchrun --nproc-per-node 2 --no-python litevae encode runs/imagenet-b path/to/images latents
             litevae encode runs/imagenet-b path/to/images latents --crop area --bucket-step 64
             litevae encode --verify latents
             litevae encode runs/imagenet-b path/to/images latents/3 --range 3/8
             litevae encode --merge latents/*

    Writes the mean and log-variance of each image's latent (not a sample) as float16 to
    shard-00000.safetensors and so on, and index.json, which lists the shards with their SHA-256 and records the
    model, the images and the settings. litevae.latents.LatentDataset reads the folder.

    The same command continues an encoding that ended for any reason, encodes damaged files again, and refuses
    other settings. Ctrl-C and SIGTERM keep every encoded image; after any other end, the incomplete shard is
    encoded again. Unreadable images are left out and listed in bad_images.txt; with --crop shorter and area, so are
    images longer than 4:1.

    With --crop shorter and area, latents have several shapes (aspect-ratio buckets), and
    litevae.latents.ShapeBatchSampler makes batches of one shape. --batch-size is the maximum, and a batch of several
    images has no more pixels than that many squares of --size.

    With torchrun, the processes share the shards, each on its own device, and write the same files as one process;
    the next run may use another number of processes. On CPUs torchrun gives each process one thread unless
    OMP_NUM_THREADS is set. Computers that do not communicate, such as those of a Slurm array, each encode a
    --range to a folder of their own; --merge joins the folders into the one that contains them, and checks all
    files. A second run on the same OUT is refused until the first has ended; if the file system
    of OUT cannot lock files, a line on stderr says so.
    """
    part = parse_part(range_)
    autoencoder = load_model(model)

    import torch
    from accelerate import PartialState

    from litevae.data.remote import redact_pattern
    from litevae.data.sources import open_images
    from litevae.environment import choose_precision
    from litevae.latents import Settings, encode_images
    from litevae.models.interface import pixel_format

    state = PartialState(cpu=not torch.accelerator.is_available())
    place = choose_device(device)
    if state.num_processes > 1 and place.type != "cpu":
        if device is not None:
            raise UserError(
                f"--device {device}: each of the {state.num_processes} processes has its own device, or cpu"
            )
        place = state.device
    images = open_images(data, images_of := pixel_format(autoencoder))
    unused_labels = getattr(images, "unused_labels", None)  # only of tables
    if unused_labels and state.is_main_process:
        print(
            f"{redact_pattern(data)}: has no column label, so the images get no labels; rename the column with the "
            f"classes to label ({', '.join(unused_labels):.200})",
            file=sys.stderr,
        )
    workers = choose_workers(workers)
    chosen = cast("Precision", choose_precision(precision, place, images_of.value_range is not None))
    size = autoencoder.config.sample_size if size is None else size
    settings = Settings(size, chosen, mirror, shard_size, crop, bucket_step)
    batch_size = batch_size or (8 if place.type == "cpu" else 32)
    try:
        result = encode_images(
            autoencoder.to(place),
            images,
            output,
            settings,
            batch_size,
            workers,
            max_bad_fraction,
            compile,
            part,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"a batch of {batch_size} images does not fit the memory of {place}: lower --batch-size"
        ) from None
    if not state.is_main_process:  # only the first process reports
        return
    report(result, place, chosen, state.num_processes, workers, cores_per_process())
    if part is not None and not result.stopped_by:
        print(f"this is range {part}: when all are encoded, join them with litevae encode --merge")
    if autoencoder.config.scaling_factor == 1:
        print(
            "this model's scaling_factor is 1: measure it with litevae scale, then run this command again to record it"
        )


def report(
    result: "Encoding", device: "torch.device", precision: str, processes: int, workers: int, cores: int
) -> None:
    if result.done:
        where = str(device) if processes == 1 else f"{processes} x {device.type}"
        print(
            f"{plural(result.done, 'image')} in {result.seconds:.1f} s: "
            f"{result.done / result.seconds:.1f} images/s; "
            f"the encoder itself: {result.done / result.encoder_seconds:.1f} images/s on {where} in {precision}"
        )
        share = f"{result.waited / result.seconds:.0%} of the time"
        if result.bottleneck == "decoding images":
            more = (
                f"more --workers than {workers} may help"
                if workers < cores
                else f"all {cores * processes} cores decode"
            )
            hint = f"decoding images (waited for them {share}): {more}"
        elif result.bottleneck == "writing":
            hint = f"writing (waited for it {result.waited_to_write / result.seconds:.0%} of the time)"
        else:
            hint = f"the encoder (waited for images {share})"
        print(f"bottleneck: {hint}")
    if result.bad:
        images = plural(result.bad, "image")
        print(f"{images} cannot be used: see {result.folder / 'bad_images.txt'}")
    if result.stopped_by:
        encoded = result.before + result.done
        print(
            f"stopped by {result.stopped_by}; {encoded} of {result.total} images are encoded: the same command "
            "continues"
        )
    elif result.done:
        count = result.total - result.bad
        print(f"{result.folder}: {f'all {count} images are' if count > 1 else 'the image is'} encoded")
    else:
        print(
            f"{result.folder}: complete already, and undamaged: {plural(result.total - result.bad, 'image')}"
        )
