import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.resnet import ResnetBlock2D

from litevae.models.layers import (
    Attention,
    CheckpointedModule,
    MidBlock,
    NoConv2d,
    ResBlock,
    compute_dtype,
)
from litevae_kernels.backend import triton_installed
from litevae_kernels.testing import gpu_calls


@pytest.mark.parametrize("out_channels", [8, 16])
def test_res_block_is_diffusers_resnet_block(out_channels):
    block = ResBlock(8, out_channels, num_groups=4)
    oracle = ResnetBlock2D(in_channels=8, out_channels=out_channels, groups=4, temb_channels=None, eps=1e-6)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    oracle.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(block(x), oracle(x, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "smc", "none"])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block_joins_a_skip(norm, out_channels):
    block = ResBlock(12, out_channels, num_groups=4, norm=norm).double()
    x, skip = (torch.randn(2, c, 4, 4, dtype=torch.float64, requires_grad=True) for c in (8, 4))
    y, expected = block(x, skip), block(torch.cat([x, skip], dim=1))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    wanted = [x, skip, *block.parameters()]
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, wanted, grad)
    for a, b in zip(actual, torch.autograd.grad(expected, wanted, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("norm", ["group", "smc", "none"])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block_changes_no_input_and_second_derivatives_are_right(norm, out_channels):
    """The residual is added in place, into a tensor that no derivative needs."""
    block = ResBlock(12, out_channels, num_groups=4, norm=norm).double().requires_grad_(False)
    x, skip = (torch.randn(1, c, 3, 2, dtype=torch.float64, requires_grad=True) for c in (8, 4))
    before = x.detach().clone(), skip.detach().clone()
    assert torch.autograd.gradcheck(block, (x, skip))
    assert torch.autograd.gradgradcheck(block, (x, skip))
    assert torch.equal(x, before[0])
    assert torch.equal(skip, before[1])


@pytest.mark.skipif(not triton_installed, reason="needs Triton")
def test_biases_have_no_pass_of_their_own_on_a_gpu():
    """PyTorch's convolution adds its bias in a pass of its own, so it gets none."""

    def with_bias(calls):
        return [args[2] is not None for name, args in calls if name == "aten::convolution"]

    block, x = ResBlock(12, 12, num_groups=4), torch.empty(2, 12, 4, 4)
    calls = gpu_calls(block, x)
    assert with_bias(calls) == [False, False]
    norms = [args for name, args in calls if name == "litevae::group_norm_silu"]
    assert [len(args) > 7 and args[7] is not None for args in norms] == [False, True]
    assert [name for name, _ in calls].count("litevae::add_residual_") == 1
    assert "aten::add_" not in [name for name, _ in calls]
    # Gradients, and layers that must be called, need the biases where they were.
    assert with_bias(gpu_calls(block, x, gradients=True)) == [True, True]
    handle = block.norm2.register_forward_hook(lambda module, args, y: None)
    assert with_bias(gpu_calls(block, x)) == [True, False]
    handle.remove()
    block.conv1.bias = None
    assert with_bias(gpu_calls(block, x)) == [False, False]


def test_group_norm_res_block_concatenates_nothing():
    """Both layers that take a skip read it directly: a 1x1 convolution of two inputs is a sum of two."""
    block = ResBlock(12, 8, num_groups=4)
    seen = []
    for layer in (block.norm1, block.conv_shortcut):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    x, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    block(x, skip)
    assert [[id(t) for t in args] for args in seen] == 2 * [[id(x), id(skip)]]


def test_smc_res_block_is_silu_and_self_modulated_convolutions():
    block = ResBlock(4, 8, num_groups=4, norm="smc").double()
    expected_keys = {f"conv{i}.{key}" for i in (1, 2) for key in ("weight", "bias", "scale", "gain")}
    assert set(block.state_dict()) == expected_keys | {"conv_shortcut.weight", "conv_shortcut.bias"}
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    h = x
    for conv in (block.conv1, block.conv2):
        norm = conv.weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        h = torch.conv2d(h * torch.sigmoid(h), conv.weight / norm, conv.bias, padding=1)
    torch.testing.assert_close(block(x), block.conv_shortcut(x) + h, atol=1e-7, rtol=1e-7)


def test_folded_res_block_is_the_self_modulated_one():
    block = ResBlock(4, 8, num_groups=4, norm="smc")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 6, 6)
    expected = block(x)
    block.fold()
    assert set(block.state_dict()) == set(ResBlock(4, 8, num_groups=4, norm="none").state_dict())
    torch.testing.assert_close(block(x), expected)
    block.fold()  # folding again changes nothing
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_is_diffusers_attention(memory_format):
    attention = Attention(16, num_groups=4)
    oracle = DiffusersAttention(
        16, heads=1, dim_head=16, eps=1e-6, norm_num_groups=4, residual_connection=True, bias=True
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    oracle.load_state_dict(attention.state_dict(), strict=True)
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=memory_format)
    y = attention(x)
    torch.testing.assert_close(y, oracle(x), atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=memory_format)


def test_attention_loads_the_names_from_before_diffusers_0_15():
    attention = Attention(16, num_groups=4)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = Attention(16, num_groups=4).state_dict()
    for new, name in names.items():
        for kind in ("weight", "bias"):
            old[f"{name}.{kind}"] = old.pop(f"{new}.{kind}")
    attention.load_state_dict(old)
    for new, name in names.items():
        assert torch.equal(attention.get_submodule(new).weight, old[f"{name}.weight"])
        assert torch.equal(attention.get_submodule(new).bias, old[f"{name}.bias"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        attention.load_state_dict({**old, "values.weight": old["value.weight"]})


def test_no_conv_passes_on_and_tells_the_dtype():
    """`next(iter(vae.post_quant_conv.parameters())).dtype` is what diffusers' pipelines ask for."""
    module = torch.nn.Sequential(NoConv2d(), torch.nn.Linear(2, 2)).half()
    x = torch.randn(2)
    assert module[0](x) is x
    assert next(iter(module[0].parameters())).dtype == torch.float16
    assert next(iter(copy.deepcopy(module).float()[0].parameters())).dtype == torch.float32
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict())
    assert list(module.state_dict()) == ["1.weight", "1.bias"]


def test_mid_block_without_attention_has_none():
    assert not any("attention" in key for key in MidBlock(8, 4, attention=False).state_dict())


def test_checkpointing_needs_to_be_enabled_and_gradients_wanted():
    module, calls = CheckpointedModule(), []

    def checkpoint(block, *args):
        calls.append(block)
        return block(*args)

    block, x = torch.nn.Identity(), torch.ones(1)
    module.run(block, x)
    module.gradient_checkpointing, module._gradient_checkpointing_func = True, checkpoint
    with torch.no_grad():
        module.run(block, x)
    assert calls == []
    module.run(block, x)
    assert calls == [block]


def test_compute_dtype():
    conv, cpu = torch.nn.Conv2d(1, 1, 1), torch.device("cpu")
    assert compute_dtype(conv, cpu) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(conv, cpu) == torch.bfloat16
        assert compute_dtype(conv.double(), cpu) == torch.float64  # autocast leaves float64 alone
        assert conv(torch.ones(1, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert compute_dtype(conv.half(), cpu) == torch.float16


def test_residual_block_calls_a_norm_that_has_a_hook():
    torch.manual_seed(0)
    block, x, seen = ResBlock(32, 32, 8), torch.randn(1, 32, 16, 16), []
    with torch.no_grad():
        expected = block(x)
        handle = block.norm2.register_forward_hook(lambda *args: seen.append(args))
        assert torch.equal(block(x), expected)
        assert len(seen) == 1
        handle.remove()
        block.conv2 = torch.nn.Conv2d(32, 32, 3, padding=1)
        assert block(x).shape == x.shape
