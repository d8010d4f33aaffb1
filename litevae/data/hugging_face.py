"""Images in datasets of Hugging Face's `datasets` library, which is an optional dependency."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from litevae.data.images import decode_image
from litevae.data.paths import name_files
from litevae.data.pixels import RGB, BadImage, PixelFormat, Pixels, check_label_length
from litevae.errors import UserError

T = TypeVar("T")


class HuggingFaceImages:
    """The images in a column of a `datasets.Dataset`, decoded by `decode_image` rather than by `datasets`.

    Args:
        dataset: dataset with a column of images.
        path: path of the dataset, for messages.
        pixel_format: what the images are.

    Attributes:
        unused_labels: if there is no column "label", the names of columns that seem to hold classes.

    Raises:
        UserError: the dataset has no rows, no column of images, or several of which none is called "image".
    """

    def __init__(self, dataset: Any, path: str, pixel_format: PixelFormat = RGB) -> None:
        from datasets import Image

        self.column, self.unused_labels = choose_columns(dataset.features, path)
        if not len(dataset):
            raise UserError(f"{path}: has no rows")
        self.path, self.pixel_format = path, pixel_format
        dataset = dataset.with_format(None)
        self.labels = dataset.select_columns("label") if "label" in dataset.features else None
        dataset = dataset.select_columns(self.column)
        self.dataset = dataset.cast_column(self.column, Image(decode=False))

    @classmethod
    def from_disk(cls, folder: Path, pixel_format: PixelFormat = RGB) -> "HuggingFaceImages":
        """Opens a folder that `save_to_disk` has written; a dictionary of splits must have only one."""
        datasets = import_datasets(str(folder))
        loaded = call_quietly(str(folder), datasets.load_from_disk, str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if len(loaded) != 1:
                raise UserError(
                    f"{folder}: has the splits {', '.join(loaded)}: name one, such as {folder}/train"
                )
            (loaded,) = loaded.values()
        return cls(loaded, str(folder), pixel_format)

    @classmethod
    def from_parquet(cls, files: Sequence[str], pixel_format: PixelFormat = RGB) -> "HuggingFaceImages":
        """Opens .parquet files as one dataset."""
        datasets = import_datasets(files[0])
        name = name_files(files)
        return cls(call_quietly(name, datasets.Dataset.from_parquet, list(files)), name, pixel_format)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def key(self, index: int) -> str:
        return f"row {index}"

    def label(self, index: int) -> str | None:
        if self.labels is None:
            return None
        return name_class(self.labels.features["label"], self.labels[index]["label"])

    def load(self, index: int) -> Pixels:
        try:
            image = self.dataset[index][self.column]
        except Exception as error:  # pyarrow raises its own exceptions for files that are corrupt or gone
            raise BadImage(f"cannot be read: {' '.join(str(error).split())}") from None
        if image and image["bytes"] is not None:
            return decode_image(io.BytesIO(image["bytes"]), self.pixel_format)
        if image and image["path"]:
            return decode_image(Path(image["path"]), self.pixel_format)
        raise BadImage("the row is empty")


def choose_columns(features: Any, path: str) -> tuple[str, list[str]]:
    """Chooses the column of images among a dataset's features.

    Returns:
        The column, and if none is called "label", the names of those that seem to hold classes.

    Raises:
        UserError: there is no column of images, or there are several of which none is called "image".
    """
    from datasets import ClassLabel, Image

    columns = [
        column
        for column, feature in features.items()
        # files without the metadata of `datasets` hold an image as a plain structure
        if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if not columns:
        raise UserError(f"{path}: has no column of images, only {', '.join(features)}")
    if len(columns) > 1 and "image" not in columns:
        raise UserError(f"{path}: images are in {', '.join(columns)}: rename the column to use to image")
    unused_labels = [
        column
        for column, feature in features.items()
        if "label" not in features
        and (isinstance(feature, ClassLabel) or re.search("label|class|cls|categor|target", column.lower()))
    ]
    return "image" if "image" in columns else columns[0], unused_labels


def name_class(feature: Any, label: Any) -> str | None:
    """Returns the name of an image's class, or None for an unknown one; `BadImage` if there is no such class."""
    if label is None or label == -1:  # `datasets` uses -1 for an unknown class
        return None
    if not hasattr(feature, "int2str"):  # only a ClassLabel has names
        text = str(label)
        check_label_length(len(text))
        return text
    if not 0 <= label < feature.num_classes:
        raise BadImage(f"its label must be from 0 to {feature.num_classes - 1}, or -1 for none, got {label}")
    name: str = feature.int2str(label)
    return name


def import_datasets(path: str) -> Any:
    """Imports `datasets`; `UserError`, which names `path`, if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: reading this needs the package datasets: pip install 'litevae[datasets]'"
        ) from None
    return datasets


def call_quietly(name: str, function: Callable[[Any], T], argument: Any) -> T:
    """Calls a function of `datasets` without progress bars; `UserError`, which names `name`, for any failure."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return function(argument)
    except Exception as error:  # `datasets` raises its own exceptions and pyarrow's
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())}") from None
    finally:
        if not hidden:
            enable_progress_bars()
