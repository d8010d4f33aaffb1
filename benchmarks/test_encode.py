"""`litevae encode` against its own encoder: the cost of reading, decoding, resizing and writing.

Both process the same images, JPEGs of ImageNet's typical size, in the command's batches. The encoder alone gets them
as tensors in its dtype and layout. The command's loop is timed as the command itself does it, from the first batch
until everything is written: the decoding processes take a fraction of a second to start and to end, which does not
matter for a data set.
"""

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.harness import contest, dtype_name
from benchmarks.models import Configuration, Gate, as_input, call_of, make_model
from benchmarks.session import Session, Timed
from litevae.cli.common import choose_workers
from litevae.data.pixels import to_model_range
from litevae.data.sources import open_images
from litevae.data.squares import SquareDataset
from litevae.environment import DTYPES, choose_precision
from litevae.latents import Settings, encode_images
from litevae.latents.index import name_shard
from litevae.latents.shards import MOMENTS

SIZE = 256
WIDTH, HEIGHT = 500, 375
DISTINCT = 48
# The first images are slower, because memory that is shared with new processes is copied, and up to one batch per
# worker is decoded before the clock starts.
COUNT = {"cpu": 64, "cuda": 16384}
BATCH = {"cpu": 8, "cuda": 32}  # default of the command
FLOAT16_ERROR = torch.finfo(torch.float16).eps  # rounding of the shards
BARS = {"cpu": {"encoder alone": 0.9}, "cuda": {}}  # 16 cores decode fewer images than a GPU encodes


def write_photographs(folder: Path, count: int) -> None:
    """Writes JPEGs of 100 to 130 KB, as in ImageNet, with structure at all scales and some noise."""
    contents = []
    for _ in range(DISTINCT):
        image = torch.randn(3, HEIGHT, WIDTH) * 0.04
        for side in (4, 16, 64):
            coarse = torch.rand(1, 3, side, side) - 0.5
            image += torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0] * 0.6
        pixels = (image.add(0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    for i in range(count):
        if i < DISTINCT:
            (folder / f"{i:05d}.jpg").write_bytes(contents[i])
        else:
            (folder / f"{i:05d}.jpg").hardlink_to(folder / f"{i % DISTINCT:05d}.jpg")


@pytest.mark.full("cpu")
@torch.inference_mode()
def test_encode(benchmark: Any, session: Session, device: str, tmp_path: Path) -> None:
    count, batch = COUNT[device], BATCH[device]
    (tmp_path / "images").mkdir()
    write_photographs(tmp_path / "images", count)
    images = open_images(str(tmp_path / "images"))
    precision, workers = choose_precision("auto", torch.device(device)), choose_workers(None)
    settings = Settings(SIZE, precision, shard_size=count)
    configuration = Configuration(DTYPES[precision], torch.channels_last, "eager")
    model = make_model("LiteVAE-B", "encoder", device)
    squares = SquareDataset(images, SIZE)
    pixels = [
        squares.collate([squares[i] for i in range(start, min(start + batch, count))]).pixels.to(device)
        for start in range(0, count, batch)
    ]
    batches = [as_input(to_model_range(each), configuration) for each in pixels]
    gates = [Gate(model, "encoder", to_model_range(pixels[i])) for i in (0, -1)]
    outputs = iter(range(10**6))

    def folder() -> Path:
        return tmp_path / f"latents-{next(outputs)}"

    def command(_: int) -> Timed:
        result = encode_images(model, images, folder(), settings, batch, workers)
        assert result.done == count
        return Timed(result.seconds)

    call = call_of(model, "encoder")  # encode_images, below, converts the model

    def alone(_: int) -> Timed:
        start = time.perf_counter()
        for each in batches:
            call(each)
        if device == "cuda":
            torch.cuda.synchronize()
        return Timed(time.perf_counter() - start)

    checked = folder()
    encode_images(model, images, checked, settings, batch, workers)
    moments = load_file(checked / name_shard(0))[MOMENTS].to(device).split(batch)
    for i, gate in zip((0, -1), gates, strict=True):
        gate.check(lambda _, i=i: moments[i], batches[i], configuration, FLOAT16_ERROR)
    contest(
        benchmark,
        session,
        f"litevae encode of JPEGs of {WIDTH}x{HEIGHT}, LiteVAE-B, {dtype_name(DTYPES[precision])}, "
        f"batches of {batch}x3x{SIZE}x{SIZE}, {workers} workers",
        "litevae encode",
        {"litevae encode": command, "encoder alone": alone},
        inputs=1,
        images=count,
        bars=BARS[device],
        rounds=7,
        least=4,
        seconds=15,
    )
