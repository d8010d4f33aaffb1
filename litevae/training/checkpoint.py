"""Writing files and folders so that what bears the final name is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ModelMixin


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it takes `path`'s place if nothing is raised."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # writers go by the suffix
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(model: ModelMixin, folder: Path) -> None:
    """Writes `model` (config.json and safetensors) to `folder`, replacing a model that is there."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # the last save was killed between its two renames
        os.rename(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
