import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from litevae_kernels import arithmetic, conv3x3, self_modulated_conv2d
from litevae_kernels.arithmetic import current_isa, multiplies, result_dtype, widened
from litevae_kernels.backend import core
from litevae_kernels.nn import Conv2d, Linear

HALVES = [torch.bfloat16, torch.float16]


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def without_half():
    """Makes the CPU one without half precision."""
    before = core.isa()
    core.set_isa("baseline")
    yield
    core.set_isa(before)


def test_what_a_cpu_multiplies(monkeypatch):
    monkeypatch.setattr(arithmetic, "_X86", True)
    monkeypatch.setattr(arithmetic, "_BFLOAT16", True)
    monkeypatch.setattr(arithmetic, "_FLOAT16", True)
    for dtype in HALVES:
        assert multiplies(dtype, "avx512bf16")
        assert multiplies(dtype, None)  # without a core
        for isa in ("baseline", "avx2", "avx512"):
            assert not multiplies(dtype, isa)
            assert multiplies(torch.float32, isa)
            assert multiplies(torch.float64, isa)
    monkeypatch.setattr(arithmetic, "_X86", False)
    monkeypatch.setattr(arithmetic, "_FLOAT16", False)
    assert multiplies(torch.bfloat16, "baseline")  # Arm's only set
    assert not multiplies(torch.float16, "baseline")


def test_the_core_and_torch_agree_about_bfloat16():
    if current_isa() == "avx512bf16":
        assert multiplies(torch.bfloat16, "avx512bf16")


@pytest.mark.usefixtures("without_half_on_any_architecture")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias = (
        values(*s, dtype=dtype, seed=i) for i, s in enumerate([(2, 8, 6, 5), (4, 8, 1, 1), (4,)])
    )
    layer = Conv2d(8, 4, 1).to(dtype)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    exact = F.conv2d(x.float(), weight.float(), bias.float())
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == dtype

    linear = Linear(8, 4).to(dtype)
    tokens = values(3, 8, dtype=dtype)
    wide = F.linear(tokens.float(), linear.weight.float(), linear.bias.float())
    assert torch.equal(linear(tokens), wide.to(dtype))


@pytest.mark.usefixtures("without_half_on_any_architecture")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_convolutions_are_rounded_once(dtype):
    x, weight = values(2, 4, 6, 5, dtype=dtype), values(4, 4, 3, 3, dtype=dtype, seed=1)
    residual = values(2, 4, 3, 3, dtype=dtype, seed=2)
    wide = F.conv2d(x.float(), weight.float(), padding=1) + values(2, 4, 6, 5, dtype=dtype).float()
    assert torch.equal(conv3x3(x, weight, residual=values(2, 4, 6, 5, dtype=dtype)), wide.to(dtype))
    strided = self_modulated_conv2d(
        x, weight, torch.ones(4, dtype=dtype), stride=2, padding=1, residual=residual
    )
    assert strided.dtype == dtype


@pytest.mark.usefixtures("without_half_on_any_architecture")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast(dtype):
    layer, x = Conv2d(8, 4, 3, stride=2), values(2, 8, 6, 5)
    with torch.autocast("cpu", dtype):
        assert result_dtype(x) == dtype
        assert result_dtype(x.double()) == torch.float64
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.conv2d(x, layer.weight, layer.bias, 2).to(dtype))
    with torch.autocast("cpu", dtype, enabled=False):
        assert layer(x).dtype == torch.float32


def test_other_calls_are_pytorchs(without_half):
    layer, x = Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), values(2, 8, 6, 5)
    plain = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert layer.double()(x.double()).dtype == torch.float64
    for dtype in HALVES:
        with pytest.raises(TypeError, match=f"^weight has dtype torch.float64; .* x's is needed, {dtype}$"):
            layer(x.to(dtype))


@pytest.mark.usefixtures("without_half_on_any_architecture")
def test_compiles_whole_and_exports():
    layer, x = Conv2d(8, 4, 1).bfloat16(), values(2, 8, 6, 5, dtype=torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x.repeat(2, 1, 1, 1)), layer(x.repeat(2, 1, 1, 1)))
        exported = torch.export.export(layer, (x,), strict=True)
    assert counter.frame_count == 1
    assert "torch.float32" not in exported.graph_module.code


def test_widening_takes_missing_operands(without_half):
    x, weight = values(2, 3, dtype=torch.bfloat16), values(4, 3, dtype=torch.bfloat16)
    assert torch.equal(widened(F.linear, x, weight, None), F.linear(x.float(), weight.float()).bfloat16())


@pytest.mark.usefixtures("without_half_on_any_architecture")
def test_a_trace_for_other_software_is_not_widened():
    layer, x = Conv2d(8, 4, 1).bfloat16(), values(2, 8, 6, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert "aten::to" not in str(traced.inlined_graph)
