"""Asynchronous copies to shared memory on the emulator: hand-written PTX, and faults that it must report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ptx_emulator.emulator import EmulatorError

Run = Callable[..., list[str]]

# 64 threads. Each copies four bytes to shared memory, and loads what thread (number + 32) % 64 copied.
EXCHANGE = """
  .shared .align 16 .b8 buffer[512];
  shl.b32 %r1, %r200, 2;
  mov.u32 %r2, buffer;
  add.s32 %r3, %r2, %r1;
  cvt.u64.u32 %rd3, %r1;
  add.s64 %rd4, %rd1, %rd3;
  mov.b32 %r6, 0;
  cp.async.ca.shared.global [%r3], [%rd4], 4;
  COMMIT
  WAIT
  BARRIER
  xor.b32 %r4, %r1, 128;
  add.s32 %r4, %r2, %r4;
  ld.shared.b32 %r5, [%r4];
  add.s64 %rd4, %rd2, %rd3;
  st.global.b32 [%rd4], %r5;
  ret;
"""
COMMIT, WAIT, BARRIER = "cp.async.commit_group;", "cp.async.wait_group 0;", "bar.sync 0;"


def exchange(
    run_ptx: Run, commit: str = COMMIT, wait: str = WAIT, barrier: str = BARRIER
) -> tuple[list[str], bool]:
    """Returns the problems, and whether the result is right."""
    numbers, out = torch.arange(64, dtype=torch.int32), torch.full((64,), -7, dtype=torch.int32)
    body = EXCHANGE.replace("COMMIT", commit).replace("WAIT", wait).replace("BARRIER", barrier)
    return run_ptx(body, numbers, out, 64), torch.equal(out, numbers.roll(32))


@pytest.mark.parametrize(
    "parts", [{}, {"commit": "", "wait": "cp.async.wait_all;"}], ids=["wait_group", "wait_all"]
)
def test_copies(run_ptx: Run, parts: dict[str, str]) -> None:
    assert exchange(run_ptx, **parts) == ([], True)


ARRIVING = "shared memory: access to the destination of an asynchronous copy before its wait"
FAULTS_OF_COPIES = {
    "no wait": ({"wait": ""}, ARRIVING),
    "not committed": ({"commit": ""}, ARRIVING),
    "a wait that leaves the copy": ({"wait": "cp.async.wait_group 1;"}, ARRIVING),
    "no barrier": ({"barrier": ""}, "shared memory: read of another thread's write without a barrier"),
    "a wait after the barrier": (
        {"wait": BARRIER, "barrier": WAIT},
        "shared memory: read of another thread's write without a barrier",
    ),
    "overwritten": ({"wait": f"st.shared.b32 [%r3], %r200; {WAIT}"}, ARRIVING),
}


@pytest.mark.parametrize("fault", FAULTS_OF_COPIES)
def test_faults_of_copies(run_ptx: Run, fault: str) -> None:
    parts, report = FAULTS_OF_COPIES[fault]
    problems, _ = exchange(run_ptx, **parts)
    assert any(line.startswith(report) for line in problems), problems


# 16 threads. Each copies as many of eight bytes as its number times four, or none from the fourth thread on.
FILL = """
  .shared .align 16 .b8 buffer[128];
  shl.b32 %r1, %r200, 3;
  mov.u32 %r2, buffer;
  add.s32 %r3, %r2, %r1;
  cvt.u64.u32 %rd3, %r1;
  add.s64 %rd4, %rd1, %rd3;
  shl.b32 %r4, %r200, 2;
  setp.lt.u32 %p1, %r200, 3;
  selp.b32 %r4, %r4, 0, %p1;
  cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x8, %r4;
  cp.async.wait_all;
  ld.shared.v2.b32 {%r5, %r6}, [%r3];
  add.s64 %rd4, %rd2, %rd3;
  st.global.v2.b32 [%rd4], {%r5, %r6};
  ret;
"""


def test_copies_fill_with_zeros(emulator: Any, run_ptx: Run) -> None:
    """Nothing is read from the addresses of copies of no bytes, which are out of bounds here."""
    numbers, out = torch.arange(1, 7, dtype=torch.int32), torch.full((32,), -7, dtype=torch.int32)
    problems: list[str] = []
    kernels = emulator.count_traffic(lambda: problems.extend(run_ptx(FILL, numbers, out, 16)))
    assert problems == []
    assert out.tolist() == [0, 0, 3, 0, 5, 6] + [0] * 26
    assert set(kernels["kernel"].loads.widths) == {8}


def test_a_copy_from_beyond_a_buffer_is_reported(run_ptx: Run) -> None:
    numbers, out = torch.arange(5, dtype=torch.int32), torch.full((32,), -7, dtype=torch.int32)
    with pytest.raises(EmulatorError, match="global memory: read out of bounds"):
        run_ptx(FILL, numbers, out, 16)
