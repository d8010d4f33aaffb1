import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as DiffusersDecoder
from torch import nn

from litevae.models.decoder import Decoder
from litevae_kernels.nn import SelfModulatedConv2d

SMALL = {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 1}
STABLE_DIFFUSION = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


# A convolution by Winograd's F(4x4, 3x3) in float32 has about 3 times the rounding error of a direct one. The rest of
# this factor allows for chance.
MORE_THAN_DIRECT = 5


def decoder(norm="group", num_upsamplers=3, num_groups=4, out_channels=3, **widths) -> Decoder:
    torch.manual_seed(0)
    return Decoder(4, out_channels, num_groups=num_groups, norm=norm, num_upsamplers=num_upsamplers, **widths)


@pytest.mark.parametrize(
    ("widths", "num_groups", "size"),
    [(SMALL, 4, (5, 7)), (STABLE_DIFFUSION, 32, (4, 2))],
    ids=["small", "sd"],
)
def test_group_norm_decoder_is_diffusers_decoder(widths, num_groups, size):
    oracle = DiffusersDecoder(
        4, 3, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=num_groups, **widths
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in oracle.parameters():
        if parameter.ndim == 1:  # norms and biases start as ones and zeros
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = decoder(num_groups=num_groups, **widths)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    z = torch.randn(2, 4, *size, generator=generator)
    with torch.no_grad():
        actual, expected = ours(z), oracle(z)
        exact = oracle.double()(z.double())
        torch.testing.assert_close(ours.double()(z.double()), exact)
    assert (actual - exact).norm() <= MORE_THAN_DIRECT * (expected - exact).norm()


def test_loads_the_decoder_of_before_diffusers_0_15():
    ours, old = decoder(**SMALL), decoder(**SMALL).state_dict()
    for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        for kind in ("weight", "bias"):
            path = "mid_block.attentions.0."
            old[f"{path}{name}.{kind}"] = old.pop(f"{path}{new}.{kind}") + 1
    ours.load_state_dict(old)
    attention = ours.mid_block.attentions[0]
    assert torch.equal(attention.to_k.bias, old["mid_block.attentions.0.key.bias"])
    assert torch.equal(attention.to_out[0].weight, old["mid_block.attentions.0.proj_attn.weight"])


def test_smc_replaces_the_norms_of_res_blocks_and_output():
    model = decoder("smc", **SMALL)
    keys = set(model.state_dict())
    assert {key for key in keys if "norm" in key} == {
        "mid_block.attentions.0.group_norm.weight",
        "mid_block.attentions.0.group_norm.bias",
    }
    modulated = {name for name, module in model.named_modules() if isinstance(module, SelfModulatedConv2d)}
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)} - modulated
    assert all(name.endswith(("conv1", "conv2")) for name in modulated)
    assert len(modulated) == 2 * (2 + 4 * 2)
    assert not any(name.endswith(("conv1", "conv2")) for name in plain)
    # Apart from the norms, the weights of a Stable Diffusion decoder fit.
    rest = {key for key in decoder(**SMALL).state_dict() if ".norm" not in key and "conv_norm_out" not in key}
    assert rest <= keys
    assert {key.rsplit(".", 1)[1] for key in keys - rest} == {"scale", "gain"}


def test_smc_keeps_the_activation_before_the_output():
    model = decoder("smc", **SMALL)
    seen = []
    model.up_blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    image = model(torch.randn(1, 4, 2, 2))
    torch.testing.assert_close(image, model.conv_out(nn.functional.silu(seen[0])))


@pytest.mark.parametrize("norm", ["group", "smc"])
@pytest.mark.parametrize("num_upsamplers", [2, 3])
def test_shapes_and_gradients(norm, num_upsamplers):
    model = decoder(norm, num_upsamplers, out_channels=12, **SMALL)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = model(z)
    assert out.shape == (2, 12, 3 * 2**num_upsamplers, 5 * 2**num_upsamplers)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        # A bias of the keys shifts all logits of a query equally, so its gradient is zero up to rounding.
        assert parameter.grad.abs().sum() > 0 or name.endswith("to_k.bias"), name
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_keeps_channels_last(norm):
    z = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    model = decoder(norm, **SMALL).to(memory_format=torch.channels_last)
    assert model(z).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_compiles_whole(norm):
    model, z = decoder(norm, **SMALL), torch.randn(2, 4, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), model(z))
