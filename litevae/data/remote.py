"""Files at addresses such as s3://bucket/x.tar or https://host/x.parquet, read in parts through `fsspec`.

Every request is repeated a few times with growing pauses, unless the answer is final, such as "no such file". Messages
never contain a user's name, password or query of an address, because a query may be a signature.
"""

import io
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from importlib.util import find_spec
from typing import Any, TypeVar

from litevae.errors import LONGEST_VALUE, UserError, one_line

T = TypeVar("T")

# Other protocols of `fsspec` log in to computers, or wrap a further address.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
ALLOWED = "s3://, gs://, hf://, http:// and https://"

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each repetition of a request
TRANSIENT = (408, 425, 429)  # HTTP statuses below 500 after which a request is repeated
READ_AHEAD = 2**20  # bytes per request while the headers of a shard are read

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class RemoteError(Exception):
    """A remote file cannot be read. The message is the reason, in one line without the address."""


def is_remote(path: str) -> bool:
    """Returns whether a path is an address, or "pipe:" with a command, rather than a local path."""
    return bool(ADDRESS.match(path)) or path.lower().startswith("pipe:")


def redact(url: str) -> str:
    """Returns an address without its user, password, query and fragment."""
    scheme, _, rest = url.partition("://")
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    if scheme.lower() != "hf":  # where @ precedes a revision
        # A secret key may have a slash.
        rest = re.sub("^(?:[^@]*:[^@]*@|[^/@]*@)+", "", rest)
    return f"{scheme}://{rest}"


def redact_text(text: str) -> str:
    """Returns a library's message, of which each address is redacted."""
    return re.sub(rf"{ADDRESS.pattern}[^\s'\"<>]+", lambda found: redact(found[0]), text)


def redact_pattern(pattern: str) -> str:
    """Returns a pattern, of which each address is redacted and each command is left out."""
    parts = (redact(part) if ADDRESS.match(part) else part for part in pattern.split("::"))
    return "::".join("pipe:" if is_remote(part) and not ADDRESS.match(part) else part for part in parts)


def check_address(url: str) -> None:
    """Raises UserError unless an address has an allowed protocol, whose package is installed."""
    if not ADDRESS.match(url):
        raise UserError(f"pipe: is refused, because it would run a command; allowed are {ALLOWED}")
    scheme = url.partition("://")[0].lower()
    package = PACKAGES.get(scheme)
    if package is None:
        raise UserError(f"{redact(url)}: {scheme}:// is refused; allowed are {ALLOWED}, and local paths")
    if find_spec(package) is None:
        raise UserError(
            f"{redact(url)}: reading this needs the package {package}: pip install "
            f"'litevae[{'gcs' if package == 'gcsfs' else 'remote'}]'"
        )


def expand_address(url: str) -> list[str]:
    """Lists the files of an address whose braces are expanded already.

    A wildcard (*, ? or [) is compared with the files of a store, and an address that ends in a slash stands for its
    .tar files. HTTP servers list no files, so that their addresses are taken as they are.

    Raises:
        UserError: the protocol is not allowed, a package is missing, or nothing matches.
    """
    check_address(url)
    scheme = url.partition("://")[0]
    if scheme.lower() in ("http", "https"):
        return [url]
    pattern = f"{url}*.tar" if url.endswith("/") else url
    if not re.search(r"[*?[]", pattern):
        return [url]
    try:
        found = request(pattern, lambda files, path: sorted(files.glob(path)))
    except RemoteError as reason:
        raise UserError(f"{redact(url)}: {reason}") from None
    if not found:
        raise UserError(f"{redact(url)}: no file matches this pattern")
    return [f"{scheme}://{path}" for path in found]


def request(url: str, function: Callable[[Any, str], T]) -> T:
    """Calls `function` with the file system and the path of an address, and repeats it after transient errors.

    Raises:
        RemoteError: the last attempt failed, or an error is final.
    """
    from fsspec.core import url_to_fs

    for wait in (*WAITS, None):
        try:
            # The instance is cached per process: one of the parent process cannot be used after a fork.
            files, path = url_to_fs(url)
            return function(files, path)
        except RemoteError:
            raise
        except Exception as raised:  # each file system raises exceptions of its own
            error = raised
            while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                error = error.__cause__  # the HTTP file system reports any failure so
            if wait is None:
                raise RemoteError(f"{describe(error)}, in {len(WAITS) + 1} attempts") from None
            if is_final(error):
                raise RemoteError(describe(error)) from None
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def http_status(error: Exception) -> int | None:
    """Returns the HTTP status that an exception of any of the file systems holds, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return status
    return None


def is_final(error: Exception) -> bool:
    """Returns whether an error would only repeat itself."""
    status = http_status(error)
    if status is not None:
        return status < 500 and status not in TRANSIENT
    final = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, TypeError, ValueError)
    # botocore's classes: the package may not be installed
    names = (
        "NoCredentialsError",
        "PartialCredentialsError",
        "ParamValidationError",
        "LocalTokenNotFoundError",
    )
    return isinstance(error, final) or type(error).__name__ in names


def describe(error: Exception) -> str:
    """Returns the reason of a failure in one line, without addresses' secrets."""
    status = http_status(error)
    if status == HTTPStatus.NOT_FOUND or isinstance(error, FileNotFoundError):
        return "no such file"
    if status is not None:
        phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else "unknown"
        return f"the server answers {status} ({phrase})"
    text = redact_text(str(error))
    if isinstance(error, PermissionError):
        return f"access is denied ({one_line(text, LONGEST_VALUE)})" if text else "access is denied"
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, 2 * LONGEST_VALUE)


def file_info(url: str) -> tuple[int, str]:
    """Asks for the size and the version of a file.

    Returns:
        Size in bytes, and a text that changes with the content, such as an ETag; it is empty if the server gives none.

    Raises:
        RemoteError: the request failed, or the server does not give the size.
    """

    def ask(files: Any, path: str) -> dict[str, Any]:
        files.invalidate_cache()
        found: dict[str, Any] = files.info(path)
        return found

    info = request(url, ask)
    if info.get("type") == "directory":
        raise RemoteError("is a folder: end the address with / to read its .tar files")
    if not isinstance(info.get("size"), int):
        raise RemoteError("the server does not give the file's size")
    names = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "LastModified", "Last-Modified", "mtime")
    return info["size"], next((str(info[name]) for name in names if info.get(name)), "")


def read_part(url: str, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset` of a file; `RemoteError` if that fails."""
    if not size:
        return b""

    def read(files: Any, path: str) -> bytes:
        if files.async_impl:
            content: bytes = files.cat_file(path, start=offset, end=offset + size)
        else:  # would fetch whole blocks
            with files.open(path, "rb", cache_type="none") as file:
                file.seek(offset)
                content = file.read(size)
        if len(content) > size:
            raise RemoteError("the server does not serve parts of files (HTTP range requests)")
        if len(content) < size:
            raise ConnectionError(f"the connection ended after {len(content)} of {size} bytes")
        return content

    return request(url, read)


class RemoteFile(io.RawIOBase):
    """A remote file as a file object for reading, without a buffer.

    Args:
        url: address of the file.
        size: size in bytes.
    """

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.size - self.position), 0)
        try:
            view[:count] = read_part(self.url, self.position, count)
        except RemoteError as reason:
            raise OSError(str(reason)) from None
        self.position += count
        return count
