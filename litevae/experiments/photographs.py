"""Photographs that anyone can install, reduced: `python -m litevae.experiments.photographs DIR`."""

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from litevae.data.images import read_image
from litevae.data.pixels import Pixels
from litevae.data.sources import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS, load_photograph
from litevae.errors import UserError
from litevae.files import replacing_folder

# Length in pixels that a photograph's shorter side is reduced to, as for ImageNet at 256 x 256. At full size, most
# parts of these photographs are so smooth that 12 Haar coefficients per block reconstruct them at more than 40 dB.
SHORTER = 256
TRAINING, HELD_OUT = "train", "held-out"  # names of the subfolders
LICENCES = "LICENCES.txt"


@dataclass(frozen=True)
class Collection:
    """Photographs from one folder of a package.

    `split` is the subfolder that they go to, and `files` are paths within `folder`. `install` is the command
    that installs the package, and `licence` says on what terms it may be used.
    """

    name: str
    split: str
    folder: Path
    files: tuple[str, ...]
    install: str
    licence: str


def package_folder(module: str, *parts: str) -> Path:
    """Returns a folder of an importable package, without importing it; a path that does not exist if it is missing."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin if spec and spec.origin else module).parent.joinpath(*parts)


def collections() -> tuple[Collection, ...]:
    """Returns the collections of files. Their drawings and renderings, which are no photographs, are left out."""
    return (
        Collection(
            "plasma-workspace-wallpapers",
            TRAINING,
            Path("/usr/share/wallpapers"),
            tuple(
                f"{name}/contents/images/2560x1600.jpg"
                for name in (
                    "BytheWater",
                    "ColdRipple",
                    "ColorfulCups",
                    "DarkestHour",
                    "EveningGlow",
                    "FallenLeaf",
                    "Grey",
                    "Kite",
                    "OneStandsOut",
                    "Path",
                    "summer_1am",
                )
            ),
            "sudo apt-get install plasma-workspace-wallpapers",
            "LGPL-3, by Maciej Wiklo, Risto Saukonpää, Dmitri Popov, Ian Hex, Martin Klapetek and Sigi Sagi: "
            "metadata.json beside each photograph, and /usr/share/doc/plasma-workspace-wallpapers/copyright",
        ),
        Collection(
            "mate-backgrounds",
            HELD_OUT,
            Path("/usr/share/backgrounds/mate/nature"),
            (
                "Aqua.jpg",
                "Blinds.jpg",
                "Dune.jpg",
                "FreshFlower.jpg",
                "Garden.jpg",
                "GreenMeadow.jpg",
                "LadyBird.jpg",
                "RainDrops.jpg",
                "Storm.jpg",
                "TwoWings.jpg",
                "Wood.jpg",
                "YellowFlower.jpg",
            ),
            "sudo apt-get install mate-backgrounds",
            "GPL-2 or later; the authors are in /usr/share/doc/mate-backgrounds/copyright",
        ),
        Collection(
            "scikit-learn",
            HELD_OUT,
            package_folder("sklearn", "datasets", "images"),
            ("china.jpg", "flower.jpg"),
            "pip install scikit-learn",
            "CC BY 2.0, by danielbuechele and vultilion: README.txt beside the photographs",
        ),
    )


SCIKIT_IMAGE_LICENCE = (
    "public domain or CC0, except the two of stereo_motorcycle, from the Middlebury stereo data of 2014 "
    "(Scharstein et al.), whose terms are not stated; the functions in skimage.data name the sources"
)


def prepare_photographs(folder: Path) -> dict[str, int]:
    """Reduces the photographs and writes them as PNG files.

    The demo's photographs are in the subfolder of the split that they have in the demo.

    Args:
        folder: folder to create, with `train`, `held-out` and a text file of the licences.

    Returns:
        The number of photographs in each subfolder.

    Raises:
        UserError: `folder` exists, a package is not installed, or a file cannot be read.
        OSError: the photographs cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: give a new folder, or delete it")
    sources = collections()
    for source in sources:
        missing = [file for file in source.files if not (source.folder / file).is_file()]
        if missing:
            raise UserError(
                f"{source.folder / missing[0]} is missing: install {source.name} with: {source.install}"
            )
    counts = dict.fromkeys((TRAINING, HELD_OUT), 0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as new:
        for split in counts:
            (new / split).mkdir(parents=True)
        for split, name, pixels in photographs(sources):
            Image.fromarray(pixels).save(new / split / f"{name}.png")
            counts[split] += 1
        (new / LICENCES).write_text(describe_licences(sources), encoding="utf-8")
    return counts


def photographs(sources: Sequence[Collection]) -> Iterator[tuple[str, str, Pixels]]:
    """Yields the split, a name for files, and the (H, W, 3) uint8 pixels of every photograph."""
    for source in sources:
        for file in source.files:
            name = Path(file).parts[0].removesuffix(".jpg")
            yield source.split, f"{source.name}-{name}", reduce(read_image(source.folder / file))
    for name in (*TRAINING_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPH):
        split = HELD_OUT if name == HELD_OUT_PHOTOGRAPH else TRAINING
        yield split, f"scikit-image-{name}", reduce(load_photograph(name))


def reduce(photograph: Pixels) -> Pixels:
    """Returns a photograph whose shorter side has at most `SHORTER` pixels, by Pillow's bicubic filter."""
    height, width = photograph.shape[:2]
    factor = SHORTER / min(height, width)
    if factor >= 1:
        return photograph
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(photograph).resize(size, Image.Resampling.BICUBIC))


def describe_licences(sources: Sequence[Collection]) -> str:
    lines = [f"{source.name}: {source.licence}." for source in sources]
    return "\n".join([*lines, f"scikit-image: {SCIKIT_IMAGE_LICENCE}."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a line on stderr that says what is missing."""
    parser = argparse.ArgumentParser(
        "python -m litevae.experiments.photographs",
        description=f"Reduce photographs of Debian packages, scikit-image and scikit-learn to {SHORTER} pixels on the "
        "shorter side.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="Folder to create.")
    folder = parser.parse_args(arguments).folder
    try:
        counts = prepare_photographs(folder)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{' and '.join(f'{count} photographs in {folder / split}' for split, count in counts.items())}")
    print(f"the licences are in {folder / LICENCES}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
