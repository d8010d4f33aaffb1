"""The library of the emulator."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


class EmulatorError(RuntimeError):
    """A kernel that stopped, or PTX that the emulator does not know."""


@dataclass
class Traffic:
    """The requests of a kernel's warps to global memory, of one direction."""

    requests: int = 0  # instructions of warps
    bytes: int = 0  # requested by the threads
    # Sectors of 32 bytes, counted once per launch. Memory moves these if caches never miss twice.
    distinct: int = 0
    sectors: int = 0  # sectors, counted once per request that touches them: the first cache moves these
    lines: int = 0  # lines of 128 bytes, counted once per request
    widths: dict[int, int] = field(default_factory=dict)  # bytes by width of a thread's access

    @property
    def excess(self) -> float:
        """Returns the bytes of the sectors, in multiples of the bytes that the threads asked for."""
        return 32 * self.sectors / self.bytes


@dataclass
class Kernel:
    """The work of a kernel since the last `reset`."""

    launches: int
    instructions: int  # sum over the threads
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    most_loads: int = 0  # loads of one thread from global memory, if traffic is counted


class Emulator:
    """An emulated GPU, which has its own modules, memory and records.

    Args:
        library: result of `build.build_emulator` or `build.build_core`.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("error", "entries", "report"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_char_p
        for name in ("load", "parameters", "launch"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_int64
        self._library.emulator_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]

    def _check(self, status: int) -> int:
        if status < 0:
            raise EmulatorError(self._library.emulator_error().decode())
        return status

    def load(self, ptx: bytes) -> int:
        """Returns the number of a module."""
        return self._check(self._library.emulator_load(ptx))

    def entries(self) -> set[str]:
        """Returns the kernels of all modules."""
        return set(self._library.emulator_entries().decode().split())

    def parameters(self, module: int, kernel: str) -> list[tuple[int, int]]:
        """Returns offset and size of each parameter."""
        most = 4096
        places = (ctypes.c_int64 * (2 * most))()
        count = self._check(
            self._library.emulator_parameters(module, kernel.encode(), places, ctypes.c_int64(most))
        )
        return [(places[2 * i], places[2 * i + 1]) for i in range(count)]

    def launch(
        self,
        module: int,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        arguments: Sequence[bytes],
        cluster: Sequence[int] = (1, 1, 1),
    ) -> None:
        """Runs a kernel.

        Args:
            module: number from `load`.
            kernel: name of an entry.
            grid: three numbers of blocks.
            block: three numbers of threads.
            shared: bytes of dynamic shared memory.
            arguments: the bits of each parameter.
            cluster: three numbers of blocks.

        Raises:
            EmulatorError: an access out of bounds, a trap, or a deadlock. All other findings are in `problems`.
        """
        places = self.parameters(module, kernel)
        packed = bytearray(max((offset + size for offset, size in places), default=0))
        for (offset, size), argument in zip(places, arguments, strict=True):
            assert len(argument) == size
            packed[offset : offset + size] = argument
        three = ctypes.c_int * 3
        status = self._library.emulator_launch(
            module, kernel.encode(), three(*grid), three(*block), three(*cluster), ctypes.c_int64(shared),
            bytes(packed), ctypes.c_int64(len(packed)),
        )  # fmt: skip
        self._check(status)

    def allow(self, x: Tensor, writable: bool) -> None:
        """Allows accesses to the memory from the first element of a tensor to its last."""
        if x.numel():
            extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
            self._library.emulator_allow(x.data_ptr(), extent * x.element_size(), writable)

    def forget(self) -> None:
        """Allows no access to global memory any more."""
        self._library.emulator_forget()

    def _report(self, kind: str) -> Iterator[list[str]]:
        for line in self._library.emulator_report().decode().splitlines():
            first, *fields = line.split("\t")
            if first == kind:
                yield fields

    def problems(self) -> list[str]:
        """Returns what is wrong since the last `reset`, each kind once: its number, and where it was first."""
        return [f"{what}, {count} times, first in {where}" for count, what, where in self._report("problem")]

    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels that ran since the last `reset`, by name."""
        out = {}
        for name, *numbers in self._report("kernel"):
            launches, instructions, loaded, stored, most = map(int, numbers)
            traffic = Traffic(distinct=loaded), Traffic(distinct=stored)
            out[name] = Kernel(launches, instructions, *traffic, most)
        for name, kind, *numbers in self._report("traffic"):
            direction, width = kind.split()
            traffic = out[name].loads if direction == "load" else out[name].stores
            requests, size, sectors, lines = map(int, numbers)
            traffic.requests += requests
            traffic.bytes += size
            traffic.sectors += sectors
            traffic.lines += lines
            traffic.widths[int(width)] = size
        return out

    def reset(self) -> None:
        """Forgets problems and kernels."""
        self._library.emulator_reset()

    @contextlib.contextmanager
    def without_barriers(self) -> Iterator[None]:
        """Makes barriers of blocks do nothing: a negative control."""
        with self._options(drop_barriers=1):
            yield

    @contextlib.contextmanager
    def without_cluster_barriers(self) -> Iterator[None]:
        """Makes barriers of clusters do nothing: another negative control."""
        with self._options(drop_cluster_barriers=1):
            yield

    @contextlib.contextmanager
    def _options(
        self, drop_barriers: int = 0, count_traffic: int = 0, drop_cluster_barriers: int = 0
    ) -> Iterator[None]:
        self._library.emulator_set_options(drop_barriers, count_traffic, drop_cluster_barriers)
        try:
            yield
        finally:
            self._library.emulator_set_options(0, 0, 0)

    def count_traffic(self, call: Callable[[], object]) -> dict[str, Kernel]:
        """Runs `call` and returns its kernels by name, with the sectors of global memory that they touch.

        32 times `Traffic.distinct` are the bytes that memory moves if the caches hold everything for the length of a
        launch. 32 times `Traffic.sectors` are those between the first cache and the threads. `Traffic.excess` is 1
        where a request uses every byte of its sectors.
        """
        self.reset()
        with self._options(count_traffic=1):
            call()
        return self.kernels()
