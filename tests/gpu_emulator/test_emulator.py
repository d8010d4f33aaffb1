"""The emulator itself: hand-written PTX, each of whose faults it must report, and which it must run right."""

import re
import struct
from typing import Any

import pytest
import torch
from ptx_emulator.emulator import EmulatorError

# 64 threads. Each stores its number to shared memory, and loads what thread (number + 32) % 64 stored.
EXCHANGE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry exchange(.param .u64 out)
{
  .reg .b32 %r<8>;
  .reg .b64 %rd<4>;
  .reg .pred %p<2>;
  .shared .align 4 .b8 buffer[260];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, buffer;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  BEFORE
  st.shared.u32 [%r4], %r1;
  BARRIER
  xor.b32 %r5, %r3, 128;
  add.s32 %r6, %r2, %r5;
  ld.shared.u32 %r7, [%r6];
  mul.wide.u32 %rd2, %r3, 1;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r7;
  ret;
}
"""
BARRIER = "bar.sync 0;"
THREADS = 64


@pytest.fixture
def exchange(emulator: Any) -> Any:
    """Returns a function that runs EXCHANGE with a barrier and a beginning of its own, and returns the result."""

    def run(barrier: str = BARRIER, before: str = "", allowed: int = THREADS) -> list[int]:
        emulator.reset()
        module = emulator.load(EXCHANGE.replace("BARRIER", barrier).replace("BEFORE", before).encode())
        out = torch.full((THREADS,), -1, dtype=torch.int32)
        emulator.allow(out[:allowed], writable=True)
        try:
            emulator.launch(
                module, "exchange", (1, 1, 1), (THREADS, 1, 1), 0, [struct.pack("<Q", out.data_ptr())]
            )
        finally:
            emulator.forget()
        return out.tolist()

    return run


def test_runs_without_problems(emulator: Any, exchange: Any) -> None:
    assert exchange() == [(i + 32) % THREADS for i in range(THREADS)]
    assert emulator.problems() == []
    assert emulator.kernels()["exchange"].launches == 1


# By case: the code in place of the barrier and before the store, and the report of it.
FAULTS = {
    "no barrier": ("", "", "shared memory: read of another thread's write without a barrier"),
    "a warp's barrier": (
        "bar.warp.sync 0xffffffff;",
        "",
        "shared memory: read of another thread's write without a barrier",
    ),
    "uninitialised": (
        "LOADS: bar.sync 0;",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra LOADS;",
        "shared memory: read of what nobody wrote",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra LOW; bar.sync 0; bra JOIN; LOW: bar.sync 0; JOIN:",
        "",
        "barrier: threads of a block wait at different barriers",
    ),
    "a barrier for half of the threads": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;",
        "",
        "barrier: some threads of the block have ended",
    ),
    "misaligned": (BARRIER, "add.s32 %r4, %r4, 1;", "misaligned access"),
    "a shuffle without its lanes": (
        BARRIER,
        "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffffffff;",
        "warp: lanes that an instruction names do not come to it",
    ),
    "a ballot without its lanes": (
        BARRIER,
        "setp.lt.u32 %p1, %r1, 8; @%p1 vote.sync.ballot.b32 %r5, %p1, 0xffffffff;",
        "warp: lanes that an instruction names do not come to it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_reports_faults(emulator: Any, exchange: Any, fault: str) -> None:
    barrier, before, report = FAULTS[fault]
    exchange(barrier, before)
    found = emulator.problems()
    assert any(line.startswith(report) for line in found), found


def test_a_ballot_is_of_the_warp(emulator: Any, exchange: Any) -> None:
    """Of the 64 threads, those up to 40 vote yes."""
    votes = exchange(before="setp.gt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r1, !%p1, 0xffffffff;")
    assert votes == 32 * [2**9 - 1] + 32 * [-1]  # each thread gets the vote of the other warp
    assert emulator.problems() == []


def test_dropped_barriers_are_races(emulator: Any, exchange: Any) -> None:
    with emulator.without_barriers():
        exchange()
    assert any("without a barrier" in line for line in emulator.problems())


def test_a_short_buffer_is_out_of_bounds(exchange: Any) -> None:
    with pytest.raises(
        EmulatorError, match=r"global memory: write out of bounds at exchange, line .*, thread 63"
    ):
        exchange(allowed=THREADS - 1)


def test_shared_memory_is_bounded(exchange: Any) -> None:
    with pytest.raises(EmulatorError, match="shared memory out of bounds"):
        exchange(before="add.s32 %r4, %r4, 8;")


def test_writes_to_inputs_and_between_blocks_are_reported(emulator: Any) -> None:
    module = emulator.load(
        EXCHANGE.replace("BARRIER", BARRIER).replace("BEFORE", "add.s32 %r1, %r1, %ctaid.x;").encode()
    )
    out = torch.full((THREADS,), -1, dtype=torch.int32)
    emulator.reset()
    emulator.allow(out, writable=False)
    emulator.launch(module, "exchange", (2, 1, 1), (THREADS, 1, 1), 0, [struct.pack("<Q", out.data_ptr())])
    emulator.forget()
    found = " ".join(emulator.problems())
    assert "write to an input" in found
    assert "two threads of a launch write different values to one place" in found


@pytest.mark.parametrize(
    "instruction",
    [
        "red.global.add.u32 [%rd1], %r1;",
        "add.rz.f32 %r1, %r1, %r1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r1, %r1, %r1}, {%r1}, {%r1}, {%r1, %r1, %r1, %r1};",
    ],
)
def test_unknown_instructions_are_refused(emulator: Any, instruction: str) -> None:
    name = re.escape(instruction.split()[0])
    with pytest.raises(EmulatorError, match=f"line .*: the emulator does not know '{name}"):
        emulator.load(EXCHANGE.replace("BARRIER", instruction).replace("BEFORE", "").encode())


CONVERT = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry convert(.param .u64 from, .param .u64 to)
{
  .reg .b16 %rs<2>;
  .reg .b32 %r<3>;
  .reg .b64 %rd<6>;
  .reg .f32 %f<2>;
  ld.param.u64 %rd1, [from];
  ld.param.u64 %rd2, [to];
  mov.u32 %r1, %tid.x;
  mad.lo.s32 %r2, %ctaid.x, 256, %r1;
  mul.wide.u32 %rd3, %r2, 4;
  add.s64 %rd4, %rd1, %rd3;
  ld.global.f32 %f1, [%rd4];
  cvt.rn.TYPE.f32 %rs1, %f1;
  mul.wide.u32 %rd3, %r2, 2;
  add.s64 %rd5, %rd2, %rd3;
  st.global.b16 [%rd5], %rs1;
  ret;
}
"""


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounds_like_torch(emulator: Any, name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1024,), generator=generator, dtype=torch.int64).int()
    numbers = bits.view(torch.float32).nan_to_num()
    halves = torch.arange(1024) / 2048 + 1  # between any two neighbours of either type
    x = torch.cat([numbers, halves, halves * 2.0**-15, halves * -32752])
    out = torch.empty(4096, dtype=dtype)
    emulator.reset()
    module = emulator.load(CONVERT.replace("TYPE", name).encode())
    emulator.allow(x, writable=False)
    emulator.allow(out, writable=True)
    pointers = [struct.pack("<Q", t.data_ptr()) for t in (x, out)]
    emulator.launch(module, "convert", (16, 1, 1), (256, 1, 1), 0, pointers)
    emulator.forget()
    assert emulator.problems() == []
    assert torch.equal(out, x.to(dtype))
