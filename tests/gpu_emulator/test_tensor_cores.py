"""The tensor cores of the emulator: hand-written PTX against plain matrix products, and faults that it must report.

The elements are small integers, so every sum is exact. The layouts are written as PTX's documentation has them, which
is not how the emulator computes them.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ptx_emulator.emulator import EmulatorError
from torch import Tensor

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
Run = Callable[..., list[str]]


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def listed(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{i}" for i in range(first, first + count)) + "}"


# --- mma.


def a_index(lane: int, i: int) -> tuple[int, int]:
    """Returns row and column of a_i, as "Matrix Fragments for mma.m16n8k16" says."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_index(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_index(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def fragments(matrix: Tensor, index: Callable[[int, int], tuple[int, int]], count: int) -> Tensor:
    """Returns the elements (32, count) of a matrix that each lane holds."""
    return torch.stack([torch.stack([matrix[index(lane, i)] for i in range(count)]) for lane in range(32)])


# Each lane loads 16 bytes of A, 8 of B and 16 of C, multiplies, and stores 16 bytes of D.
MMA = """
  mul.wide.u32 %rd3, %r200, 40;
  add.s64 %rd4, %rd1, %rd3;
  ld.global.v2.b32 {%r0, %r1}, [%rd4];
  ld.global.v2.b32 {%r2, %r3}, [%rd4+8];
  ld.global.v2.b32 {%r4, %r5}, [%rd4+16];
  ld.global.v2.b32 {%r6, %r7}, [%rd4+24];
  ld.global.v2.b32 {%r8, %r9}, [%rd4+32];
  setp.lt.u32 %p1, %r200, 16;
  PRODUCT
  mul.wide.u32 %rd3, %r200, 16;
  add.s64 %rd4, %rd2, %rd3;
  st.global.v4.b32 [%rd4], {%r6, %r7, %r8, %r9};
  ret;
"""
PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 "
    "{%r6, %r7, %r8, %r9}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r7, %r8, %r9};"
)


def multiply(
    run_ptx: Run, name: str, product: str, factors: tuple[Tensor, Tensor] | None = None
) -> tuple[list[str], Tensor, Tensor]:
    """Returns problems, D = A B + C, and what D must be."""
    a, b = (integers(16, 16), integers(16, 8)) if factors is None else factors
    c = integers(16, 8) if factors is None else torch.zeros(16, 8)
    packed = [
        fragments(a.to(TYPES[name]), a_index, 8).view(torch.int32),
        fragments(b.to(TYPES[name]), b_index, 4).view(torch.int32),
        fragments(c, c_index, 4).view(torch.int32),
    ]
    out = torch.full((32, 4), torch.nan)
    body = MMA.replace("PRODUCT", product).replace("TYPE", name)
    problems = run_ptx(body, torch.cat(packed, 1), out, 32)
    return problems, out, fragments(a @ b + c, c_index, 4)


@pytest.mark.parametrize("name", TYPES)
def test_mma(run_ptx: Run, name: str) -> None:
    problems, out, exact = multiply(run_ptx, name, PRODUCT)
    assert problems == []
    assert torch.equal(out, exact)


def test_wrong_fragments_of_mma_change_the_result(run_ptx: Run) -> None:
    swapped = PRODUCT.replace("%r0, %r1,", "%r1, %r0,")
    problems, out, exact = multiply(run_ptx, "f16", swapped)
    assert problems == []
    assert not torch.equal(out, exact)


def test_mma_needs_all_lanes(run_ptx: Run) -> None:
    problems, _, _ = multiply(run_ptx, "f16", f"@%p1 {PRODUCT}")
    assert any("lanes that an instruction names do not come to it" in line for line in problems)


def test_sums_of_mma_lose_what_a_tensor_core_loses(run_ptx: Run) -> None:
    """A term is cut off 24 bits below the largest: 2^-25 is lost beside 1, however often it is added."""
    a, b = torch.full((16, 16), 2.0**-13), torch.full((16, 8), 2.0**-12)
    a[:, 0] = b[0] = 1
    problems, out, _ = multiply(run_ptx, "f16", PRODUCT, (a, b))
    assert problems == []
    assert torch.equal(out, torch.ones(32, 4))


# --- wgmma.

ROWS, COLUMNS, DEPTH = 64, 128, 16
PLACE_OF_B, IMAGE = 8192, 24576  # bytes of shared memory


def offset_of(coordinate: int, shape: Any, stride: Any) -> int:
    """Returns the offset of a coordinate in one mode of a CuTe layout, whose first axis is the fastest."""
    offset = 0
    for size, step in zip(shape, stride, strict=True):
        offset += coordinate % size * step
        coordinate //= size
    assert coordinate == 0
    return offset


def canonical(size: int, mode: int, transposed: bool) -> tuple[list[Any], list[Any], int, int]:
    """Returns shapes and strides of a factor's two modes, and the two offsets in bytes ("Canonical Layouts").

    Args:
        size: number of rows of A, or of columns of B.
        mode: 0 for no swizzle, or 1 to 3 for rows of 128, 64 or 32 bytes.
        transposed: whether rows of A or columns of B are adjacent, and not the depth.
    """
    t, k = 8, DEPTH // 8
    wide = (1, 8, 4, 2)[mode]
    if not transposed:
        m = size // 8
        if mode == 0:
            lbo, sbo = 64, 128
            return [(8, m), (t, k)], [(t, sbo), (1, lbo)], 2 * lbo, 2 * sbo
        sbo = 8 * wide * t
        return [(8, m), (t, k)], [(wide * t, sbo), (1, t)], 16, 2 * sbo
    m = size // (t * wide)
    if mode == 0:
        lbo, sbo = 64, 128
        return [(t, 1, m), (8, k)], [(1, t, sbo), (t, lbo)], 2 * lbo, 2 * sbo
    lbo, sbo = 16 * wide * t, 8 * wide * t
    return [(t, wide, m), (8, k)], [(1, t, lbo), (wide * t, sbo)], 2 * lbo, 2 * sbo


def place(image: Tensor, matrix: Tensor, start: int, mode: int, transposed: bool) -> int:
    """Puts a factor (size, DEPTH) into the image of shared memory, and returns its descriptor."""
    shapes, strides, leading, stride = canonical(len(matrix), mode, transposed)
    bits = (0, 3, 2, 1)[mode]
    for i, j in itertools.product(range(len(matrix)), range(DEPTH)):
        offset = offset_of(i, shapes[0], strides[0]) + offset_of(j, shapes[1], strides[1])
        byte = start + 2 * offset
        byte ^= (byte >> 7 & ((1 << bits) - 1)) << 4  # Swizzle<bits, 4, 3>
        assert image[byte // 2].isnan()
        image[byte // 2] = matrix[i, j]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def steps(
    loads_a: bool, transposed: tuple[bool, bool], name: str, descriptors: tuple[int, int]
) -> dict[str, str]:
    """Returns the parts of a product on 128 threads, by name."""
    chunks = range(IMAGE // 16 // 128)
    a = "%rd5" if loads_a else listed(64, 4)
    flags = [str(int(flag)) for flag in transposed[0 if loads_a else 1 :]]
    product = f"wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{name}.{name}"
    return {
        "copy": ".shared .align 1024 .b8 image[24576]; shl.b32 %r201, %r200, 4; mov.u32 %r202, image;"
        "add.s32 %r202, %r202, %r201; cvt.u64.u32 %rd3, %r201; add.s64 %rd4, %rd1, %rd3;"
        + "".join(
            f"ld.global.v4.b32 {listed(0, 4)}, [%rd4+{2048 * i}]; st.shared.v4.b32 [%r202+{2048 * i}], {listed(0, 4)};"
            for i in chunks
        ),
        "proxy fence": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;",
        "fragments": "" if loads_a else f"ld.global.v4.b32 {listed(64, 4)}, [%rd4+{IMAGE}];",
        "zeros": "".join(f"mov.b32 %r{i}, 0;" for i in range(64)),
        "descriptors": f"mov.b64 %rd5, {descriptors[0]}; mov.b64 %rd6, {descriptors[1]}; mov.pred %p1, -1;"
        "setp.lt.u32 %p2, %r200, 96; setp.lt.u32 %p3, %r200, 120;",
        "fence": "wgmma.fence.sync.aligned;",
        "product": f"{product} {listed(0, 64)}, {a}, %rd6, %p1, 1, 1, {', '.join(flags)};",
        "commit": "wgmma.commit_group.sync.aligned;",
        "after": "",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "store": "mul.wide.u32 %rd3, %r200, 256; add.s64 %rd4, %rd2, %rd3;"
        + "".join(f"st.global.b32 [%rd4+{4 * i}], %r{i};" for i in range(64))
        + "ret;",
    }


def d_index(thread: int, i: int) -> tuple[int, int]:
    """Returns row and column of d_i, as "Register Fragments" of wgmma.mma_async.m64nNk16 shows them."""
    warp, lane = divmod(thread, 32)
    return 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


class Product:
    """A product of a 64 x 16 by a 16 x 128 matrix; `parts` may be changed before `run`."""

    def __init__(
        self,
        mode: int = 1,
        transposed: tuple[bool, bool] = (False, False),
        loads_a: bool = True,
        name: str = "f16",
    ) -> None:
        a, b = integers(ROWS, DEPTH), integers(COLUMNS, DEPTH)
        image = torch.full((IMAGE // 2,), torch.nan)
        first = place(image, a, 0, mode, transposed[0])
        second = place(image, b, PLACE_OF_B, mode, transposed[1])
        # a_i of each thread, if A is in registers.
        held = torch.stack(
            [
                torch.stack(
                    [
                        a[16 * (t // 32) + row, column]
                        for row, column in map(lambda i, t=t: a_index(t % 32, i), range(8))
                    ]
                )
                for t in range(128)
            ]
        )
        self.memory = torch.cat([image, held.flatten()]).to(TYPES[name])
        self.parts = steps(loads_a, transposed, name, (first, second))
        self.exact = a @ b.T

    def run(self, run_ptx: Run) -> tuple[list[str], bool]:
        """Returns the problems, and whether the result is right."""
        out = torch.full((128, 64), torch.nan)
        problems = run_ptx("\n".join(self.parts.values()), self.memory, out, 128)
        rows, columns = torch.tensor([[d_index(t, i) for i in range(64)] for t in range(128)]).unbind(2)
        return problems, torch.equal(out, self.exact[rows, columns])


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("mode", range(4))
def test_wgmma(run_ptx: Run, mode: int, transposed: tuple[bool, bool]) -> None:
    name = ("f16", "bf16")[mode % 2]
    assert Product(mode, transposed, name=name).run(run_ptx) == ([], True)


@pytest.mark.parametrize("name", TYPES)
def test_wgmma_with_a_in_registers(run_ptx: Run, name: str) -> None:
    assert Product(2, (False, True), loads_a=False, name=name).run(run_ptx) == ([], True)


@pytest.mark.parametrize("adds", [True, False])
def test_wgmma_adds_to_its_accumulators_or_replaces_them(run_ptx: Run, adds: bool) -> None:
    product = Product()
    product.parts["zeros"] = product.parts["zeros"].replace(", 0;", ", 0x3f800000;")  # ones
    if adds:
        product.exact += 1
    else:
        product.parts["descriptors"] += "mov.pred %p1, 0;"
    assert product.run(run_ptx) == ([], True)


def test_products_in_flight_add_to_the_same_registers(run_ptx: Run) -> None:
    product = Product()
    product.parts["commit"] = (
        "wgmma.commit_group.sync.aligned;".join([""] + [product.parts["product"]] * 2)
        + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"
    )
    product.exact *= 3
    assert product.run(run_ptx) == ([], True)


IN_FLIGHT = "wgmma: use of a register before the wait for the product that writes it"
UNFENCED = "shared memory: read by a tensor core of a write without fence.proxy.async"
# By case: the parts that are different, and the report of it.
FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "no wait": ({"wait": ""}, IN_FLIGHT),
    "a wait that leaves the product": ({"wait": "wgmma.wait_group.sync.aligned 1;"}, IN_FLIGHT),
    "not committed": ({"commit": ""}, IN_FLIGHT),
    "no fence": ({"fence": ""}, "wgmma: a register was written after the last wgmma.fence"),
    "no proxy fence": (
        {"proxy fence": ""},
        UNFENCED,
    ),
    "no barrier": ({"barrier": ""}, "shared memory: read of another thread's write without a barrier"),
    "a factor is overwritten": (
        {"after": "st.shared.b32 [%r202], %r200;"},
        "wgmma: shared memory was written before the wait for the product that reads it",
    ),
    "an accumulator is overwritten": ({"after": "mov.b32 %r5, 0;"}, IN_FLIGHT),
    "three warps": (
        {"fence": "@%p2 wgmma.fence.sync.aligned;", "product": "@%p2 "},
        "wgmma: the warps of a group",
    ),
    "a part of a warp": ({"product": "@%p3 "}, "warp: lanes that an instruction names do not come to it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_wgmma(run_ptx: Run, fault: str) -> None:
    parts, report = FAULTS[fault]
    product = Product()
    for name, part in parts.items():
        product.parts[name] = (
            part + product.parts[name] if part.startswith("@") and part.endswith(" ") else part
        )
    problems, _ = product.run(run_ptx)
    assert any(line.startswith(report) for line in problems), problems


FENCE = "fence.proxy.async;"


# By case: what lies before and after the barrier of the cluster, and whether that suffices.
@pytest.mark.parametrize(
    ("before", "after", "fenced"),
    [
        ("", "", False),
        (FENCE, "", True),
        ("", FENCE, True),
        ("@%p3 " + FENCE, "", False),
        ("@%p3 " + FENCE, "@%p3 " + FENCE, True),
    ],
    ids=["none", "of the writers", "of the readers", "of a writer", "of one block"],
)
def test_the_tensor_cores_read_what_another_block_wrote(
    run_ptx: Run, before: str, after: str, fenced: bool
) -> None:
    barrier = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    place = "add.s32 %r202, %r202, %r201;"
    of_the_other = (
        "mov.u32 %r203, %cluster_ctarank; setp.eq.u32 %p3, %r203, 0; xor.b32 %r203, %r203, 1;"
        "mapa.shared::cluster.u32 %r202, %r202, %r203;"
    )
    product = Product()
    copy = product.parts["copy"].replace("st.shared.", "st.shared::cluster.")
    product.parts["copy"] = copy.replace(place, place + of_the_other + barrier)
    product.parts["proxy fence"], product.parts["barrier"] = before, barrier + after
    problems, right = product.run(partial(run_ptx, blocks=2))
    assert right
    assert [line.startswith(UNFENCED) for line in problems] == [True] * (not fenced), problems


def test_a_fragment_may_not_change_before_the_wait(run_ptx: Run) -> None:
    product = Product(loads_a=False)
    product.parts["after"] = "mov.b32 %r64, 0;"
    problems, _ = product.run(run_ptx)
    assert any("written before the wait for the product that reads it" in line for line in problems), problems


def test_another_swizzle_changes_the_result(run_ptx: Run) -> None:
    product = Product(1)
    product.parts["descriptors"] += "xor.b64 %rd6, %rd6, 0xC000000000000000;"
    problems, right = product.run(run_ptx)
    assert not right
    assert problems == []


def test_a_factor_beyond_shared_memory_is_reported(run_ptx: Run) -> None:
    product = Product()
    product.parts["descriptors"] += "add.s64 %rd6, %rd6, 512;"
    with pytest.raises(EmulatorError, match="shared memory out of bounds"):
        product.run(run_ptx)
