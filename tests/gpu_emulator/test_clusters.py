"""Thread-block clusters on the emulated GPU: hand-written PTX with each fault, and the kernel that uses them."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_emulator.emulator import EmulatorError

from benchmarks.gpu import clusters
from litevae_kernels.group_norm_silu import native

# Each thread stores its number in the grid to shared memory, and loads that of a thread of the next block.
RING = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry ring(.param .u64 out)
{
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  .reg .pred %p<2>;
  .shared .align 4 .b8 buffer[128];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mad.lo.s32 %r3, %r2, 32, %r1;
  mov.u32 %r4, buffer;
  shl.b32 %r5, %r1, 2;
  add.s32 %r6, %r4, %r5;
  mov.u32 %r7, %cluster_ctarank;
  mov.u32 %r8, %cluster_nctarank;
  add.s32 %r9, %r7, 1;
  rem.u32 %r9, %r9, %r8;
  st.shared.u32 [%r6], %r3;
  FIRST
  ACCESS
  LAST
  mul.wide.u32 %rd2, %r3, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r11;
  ret;
}
"""
BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
RELAXED = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
LOAD = "mapa.shared::cluster.u32 %r10, %r6, %r9; ld.shared::cluster.u32 %r11, [%r10];"
GENERIC = """
  cvt.u64.u32 %rd4, %r6; cvta.shared.u64 %rd4, %rd4; mapa.u64 %rd5, %rd4, %r9; ld.u32 %r11, [%rd5];
  getctarank.u32 %r12, %rd5; sub.s32 %r12, %r12, %r9; add.s32 %r11, %r11, %r12;
"""

Ring = Callable[..., list[int]]


@pytest.fixture
def ring(emulator: Any) -> Ring:
    """Returns a function that runs RING in two clusters, and returns what each thread loaded."""

    def run(
        first: str = BARRIER, last: str = BARRIER, access: str = LOAD, blocks: int = 4, grid: int = 8
    ) -> list[int]:
        emulator.reset()
        text = RING.replace("FIRST", first).replace("LAST", last).replace("ACCESS", access)
        module = emulator.load(text.encode())
        out = torch.full((32 * grid,), -1, dtype=torch.int32)
        emulator.allow(out, writable=True)
        try:
            emulator.launch(
                module, "ring", (grid, 1, 1), (32, 1, 1), 0,
                [struct.pack("<Q", out.data_ptr())], cluster=(blocks, 1, 1),
            )  # fmt: skip
        finally:
            emulator.forget()
        return out.tolist()

    return run


@pytest.mark.parametrize("access", [LOAD, GENERIC], ids=["shared::cluster", "generic"])
@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
def test_blocks_read_each_other(emulator: Any, ring: Ring, blocks: int, access: str) -> None:
    found = ring(blocks=blocks, grid=2 * blocks, access=access)
    assert emulator.problems() == []
    next_blocks = [i - i % blocks + (i + 1) % blocks for i in range(2 * blocks)]
    assert found == [32 * block + thread for block in next_blocks for thread in range(32)]


COPY = "cp.async.ca.shared.global [%r6], [%rd1], 4, 0;"  # of zeros


def test_a_block_reads_what_another_copied(emulator: Any, ring: Ring) -> None:
    assert ring(first=COPY + "cp.async.wait_all;" + BARRIER) == [0] * 256
    assert emulator.problems() == []


RACE = "shared memory: read of another thread's write without a barrier"
NOT_STARTED = "cluster: access to the shared memory of a block that may not have started"
EARLY_END = "cluster: a block may end before another block's access to its shared memory"
# By case: the barriers before and after the access, the access, and the reports.
FAULTS = {
    "no barrier before": ("", BARRIER, LOAD, (RACE, NOT_STARTED)),
    "no barrier after": (BARRIER, "", LOAD, (EARLY_END,)),
    "a barrier of the block": ("bar.sync 0;", BARRIER, LOAD, (RACE,)),
    "an arrival without a release": (RELAXED, BARRIER, LOAD, (RACE,)),
    "an arrival before the access": (
        BARRIER + "barrier.cluster.arrive;",
        "barrier.cluster.wait;",
        LOAD,
        (EARLY_END,),
    ),
    "a write of what others read": (
        BARRIER,
        "bar.sync 0; st.shared.u32 [%r6], 0;" + BARRIER,
        LOAD,
        ("shared memory: write after another thread's read without a barrier",),
    ),
    "a write of one place by all": (
        BARRIER,
        BARRIER,
        "mapa.shared::cluster.u32 %r10, %r6, 0; st.shared::cluster.u32 [%r10], %r3; mov.u32 %r11, 0;",
        ("shared memory: write after another thread's write without a barrier",),
    ),
    "a copy under way": (
        COPY + BARRIER,
        "cp.async.wait_all;" + BARRIER,
        LOAD,
        ("shared memory: access to the destination of an asynchronous copy before its wait",),
    ),
    "two arrivals": (
        "barrier.cluster.arrive;" + BARRIER,
        BARRIER,
        LOAD,
        ("cluster barrier: a thread arrives twice",),
    ),
    "missing lanes": (
        "setp.lt.u32 %p1, %r1, 8; @%p1 barrier.cluster.arrive.aligned;"
        "@!%p1 barrier.cluster.arrive; barrier.cluster.wait;",
        BARRIER,
        LOAD,
        ("cluster barrier: .aligned, but lanes are missing",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_reports_faults(emulator: Any, ring: Ring, fault: str) -> None:
    *barriers, access, reports = FAULTS[fault]
    ring(*barriers, access)
    found = emulator.problems()
    for report in reports:
        assert any(line.startswith(report) for line in found), found


# By case: the arguments of `ring`, and the error that stops the kernel.
STOPS = {
    "out of bounds": (
        {"access": "add.s32 %r6, %r6, 4;" + LOAD},
        "shared memory out of bounds at ring, line .*, thread 31",
    ),
    "another block's address as a block's own": (
        {"access": LOAD.replace("ld.shared::cluster", "ld.shared")},
        "shared memory out of bounds",
    ),
    "no such block": ({"access": LOAD.replace("%r9", "%r8")}, "no block of rank 4"),
    "a block that never arrives": (
        {"first": "setp.eq.u32 %p1, %r7, 0; @%p1 bra WAIT; " + BARRIER + "bra JOIN; WAIT: bar.sync 0; "
         "barrier.cluster.wait; JOIN:"},
        "threads wait for others that never arrive",
    ),
    "a grid that does not fit": ({"grid": 6}, "the grid is no multiple of the cluster"),
    "a cluster that is too large": ({"grid": 32, "blocks": 32}, "a cluster needs 1 to 16 blocks"),
}  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
def test_stops(ring: Ring, stop: str) -> None:
    arguments, error = STOPS[stop]
    with pytest.raises(EmulatorError, match=error):
        ring(**arguments)


def test_the_documentation_has_the_table(cuda_kernels: Any) -> None:
    table = clusters.table(cuda_kernels.core)
    assert table in (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")


def test_the_choice_depends_on_the_card(cuda_kernels: Any) -> None:
    """By shape: clusters, blocks per cluster and whether they serve, on cards of several sizes."""
    x = torch.empty(1, 160, 128, 128, dtype=torch.bfloat16, device="meta")  # two clusters of 2.6 MB

    def choose(batch: int, card: tuple[int, int, int]) -> tuple[int, int]:
        view = clusters.view(x.expand(batch, -1, -1, -1))
        return cuda_kernels.core.group_norm_silu_clusters(view, None, view, 32, card)[:2]

    assert choose(8, (132, 232448, 16)) == (16, 16)
    assert choose(1, (132, 232448, 16)) == (0, 0)  # 32 blocks would leave most of the card idle
    assert choose(1, (32, 232448, 16)) == (2, 16)
    for lacking in ((132, 232448, 8), (132, 101376, 16), (132, 232448, 0)):
        assert choose(8, lacking) == (0, 0)


def norm(kernels: Any) -> None:
    """Runs a forward pass in clusters of several blocks."""
    x = torch.randn(1, 32, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    y, stats = torch.empty_like(x), torch.empty(1, 8, 2, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "mode", "clusters")
        kernels.run("group_norm_silu", "forward", x, None, None, None, y, stats, 8, 1e-6, written=[y, stats])


@pytest.mark.parametrize("which", ["", "_cluster"])
def test_the_kernel_needs_its_barriers(cuda_kernels: Any, which: str) -> None:
    emulator = cuda_kernels.emulator
    emulator.reset()
    norm(cuda_kernels)
    assert emulator.problems() == []
    with getattr(emulator, f"without{which}_barriers")():
        norm(cuda_kernels)
    found = emulator.problems()
    for report in (RACE, EARLY_END) if which else (RACE,):
        assert any(line.startswith(report) for line in found), found
