"""Images in .parquet files at addresses, of which only the row groups that are needed are fetched."""

import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from litevae.data.hugging_face import choose_columns, import_datasets, name_class
from litevae.data.images import decode_image
from litevae.data.paths import name_files
from litevae.data.pixels import RGB, BadImage, PixelFormat, Pixels
from litevae.data.remote import RemoteError, RemoteFile, file_info, is_remote, redact
from litevae.errors import UserError

CONNECTIONS = 16  # files whose metadata are read at the same time
GROUPS_TOGETHER = 8  # row groups whose images are shuffled together, and which a process keeps in memory


class RemoteParquet:
    """The images in a column of .parquet files. A row group is the smallest part that can be read.

    Args:
        files: addresses of the files, or paths, in their order.
        pixel_format: what the images are.

    Attributes:
        unused_labels: if there is no column "label", the names of columns that seem to hold classes.
        groups: (G,) number of the first row of each row group. Images of a group should be read one after another.

    Raises:
        UserError: a file cannot be read or has other columns than the first, there are no rows, or there is no column
            of images.
    """

    def __init__(self, files: Sequence[str], pixel_format: PixelFormat = RGB) -> None:
        import_datasets(redact(files[0]))
        from datasets import Features

        self.files, self.pixel_format = list(files), pixel_format
        self.shown = [redact(file) if is_remote(file) else file for file in self.files]
        self.path = name_files(self.shown)
        with ThreadPoolExecutor(CONNECTIONS) as executor:
            found = list(executor.map(read_metadata, self.files))
        failures = [
            f"{name}: {failure}" for name, (*_, failure) in zip(self.shown, found, strict=True) if failure
        ]
        if len(failures) > 1:
            raise UserError(f"{len(failures)} of {len(files)} files cannot be read: {'; '.join(failures)}")
        if failures:
            raise UserError(failures[0])
        self.sizes = [size for size, *_ in found]
        self.metadata = [metadata for _, metadata, _ in found]
        schemas = [metadata.schema.to_arrow_schema() for metadata in self.metadata]
        for name, schema in zip(self.shown, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise UserError(f"{name}: has other columns than {self.shown[0]}")
        features = Features.from_arrow_schema(schemas[0])
        self.column, self.unused_labels = choose_columns(features, self.path)
        self.label_feature = features.get("label")
        self.columns = [self.column, *(["label"] if self.label_feature is not None else [])]
        # per row group: number of the file, and of the group in it
        self.places = [(i, g) for i, each in enumerate(self.metadata) for g in range(each.num_row_groups)]
        rows = [self.metadata[i].row_group(g).num_rows for i, g in self.places]
        ends = np.cumsum(rows, dtype=np.int64)
        self.groups = ends - np.array(rows, dtype=np.int64)
        self.count = int(ends[-1]) if rows else 0
        if not self.count:
            raise UserError(f"{self.path}: has no rows")
        self.tables: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def key(self, index: int) -> str:
        return f"row {index}"

    def label(self, index: int) -> str | None:
        if self.label_feature is None:
            return None
        return name_class(self.label_feature, self.row(index)["label"])

    def load(self, index: int) -> Pixels:
        image = self.row(index)[self.column]
        if not image or image["bytes"] is None:  # a path would lead to a file of this computer
            raise BadImage(
                "the row is empty" if not image or not image["path"] else "the row holds only a path"
            )
        return decode_image(io.BytesIO(image["bytes"]), self.pixel_format)

    def row(self, index: int) -> dict[str, Any]:
        """Returns a row; `BadImage` if it cannot be read."""
        number = int(np.searchsorted(self.groups, index, side="right")) - 1
        if number not in self.tables:
            self.tables[number] = self.read_group(number)
            if len(self.tables) > GROUPS_TOGETHER:
                self.tables.popitem(last=False)
        self.tables.move_to_end(number)
        row: dict[str, Any] = self.tables[number].slice(index - int(self.groups[number]), 1).to_pylist()[0]
        return row

    def read_group(self, number: int) -> Any:
        """Fetches a row group; `BadImage` if that fails."""
        from pyarrow import parquet

        file, group = self.places[number]
        try:
            with open_parquet(self.files[file], self.sizes[file]) as opened:
                source = parquet.ParquetFile(opened, metadata=self.metadata[file], pre_buffer=True)
                return source.read_row_group(group, columns=self.columns, use_threads=False)
        except Exception as error:  # pyarrow raises its own exceptions
            raise BadImage(f"row group {group} of {self.shown[file]} cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": OrderedDict()}


def open_parquet(path: str, size: int) -> Any:
    """Opens a local or a remote file of `size` bytes."""
    return RemoteFile(path, size) if is_remote(path) else open(path, "rb")


def read_metadata(path: str) -> tuple[int, Any, str]:
    """Returns a file's size and metadata, and the reason why they cannot be read, which is empty if they can."""
    from pyarrow import parquet

    try:
        size = file_info(path)[0] if is_remote(path) else Path(path).stat().st_size
        with open_parquet(path, size) as file:
            return size, parquet.read_metadata(file), ""
    except RemoteError as reason:
        return 0, None, str(reason)
    except Exception as error:  # pyarrow raises its own exceptions
        return 0, None, f"cannot be read: {error}"
