"""Libraries that wrap or replace `nn.Conv2d` by its constructor and its forward, on a ResBlock and on diffusers'."""

import copy
import warnings

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune, spectral_norm

from litevae.models.layers import ResBlock

LAYERS = ("conv1", "conv2", "conv_shortcut")


def lora(block: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights=False)
    block = inject_adapter_in_model(config, block)
    for name in LAYERS:
        for part in (getattr(block, name).lora_A, getattr(block, name).lora_B):
            nn.init.normal_(part["default"].weight, std=0.1)
    return block


def pruned(block: nn.Module) -> nn.Module:
    for name in LAYERS:
        prune.l1_unstructured(getattr(block, name), "weight", amount=0.5)
    return block


def normalised(block: nn.Module) -> nn.Module:
    for i, name in enumerate(LAYERS):
        torch.manual_seed(i)  # the power iteration starts at random
        parametrizations.spectral_norm(getattr(block, name))
    return block.eval()


def normalised_by_hook(block: nn.Module) -> nn.Module:
    for i, name in enumerate(LAYERS):
        torch.manual_seed(i)
        spectral_norm(getattr(block, name))
    return block.eval()


def quantised(block: nn.Module) -> nn.Module:
    for name in LAYERS:
        conv = getattr(block, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao has moved to torchao
            config = get_default_qat_qconfig("fbgemm")
            new = qat.Conv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, qconfig=config
            )
        new.load_state_dict(conv.state_dict(), strict=False)
        setattr(block, name, new)
    return block


def patched(block: nn.Module) -> nn.Module:
    """Replaces the forward of each layer, as kohya's LoRA does."""
    for name in LAYERS:
        conv = getattr(block, name)

        def forward(x, original=conv.forward):
            return original(x) + original(0.1 * x)

        conv.forward = forward
    return block


def subclassed(block: nn.Module) -> nn.Module:
    """Replaces each layer's class by a subclass with another forward."""
    for name in LAYERS:
        conv = getattr(block, name)

        class Changed(type(conv)):
            def forward(self, x):
                return self._conv_forward(x, self.weight.round(decimals=1), self.bias)

        conv.__class__ = Changed
    return block


METHODS = [lora, pruned, normalised, normalised_by_hook, quantised, patched, subclassed]


@pytest.fixture
def blocks(randomised):
    torch.manual_seed(0)
    ours = randomised(ResBlock(12, 8, num_groups=4))
    theirs = ResnetBlock2D(in_channels=12, out_channels=8, groups=4, temb_channels=None, eps=1e-6)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_changed_block_is_diffusers_block_with_the_same_change(blocks, method, skip):
    x = torch.randn(2, 12, 6, 5)
    before = blocks[1](x, None)
    ours, theirs = map(method, blocks)
    actual = ours(*x.split([8, 4], dim=1)) if skip else ours(x)
    expected = theirs(x, None)
    assert (expected - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_merged_adapters_give_the_same(norm):
    """Adapters see what the convolution sees, also where a SiLU that is not a layer precedes it."""
    torch.manual_seed(0)
    block = lora(ResBlock(12, 8, num_groups=4, norm=norm))
    x = torch.randn(2, 12, 6, 5)
    expected = block(x)
    for layer in block.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_adapters_train_in_the_whole_model(make, image):
    vae = make()
    names = [name for name, module in vae.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    vae.requires_grad_(False)
    before = copy.deepcopy(vae)(image).sample
    vae = inject_adapter_in_model(LoraConfig(r=2, target_modules=names), vae)
    torch.testing.assert_close(vae(image).sample, before, atol=1e-4, rtol=1e-4)  # adapters begin with zeros
    vae(image).sample.square().mean().backward()
    trained = {name for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in vae.named_parameters() if "lora_" in name}


class Around(nn.Module):
    """Stands for a layer by its constructor and its forward alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Hidden(Around):
    """The same without parameters, like a layer whose weights are packed in another format."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer = layer.forward


@pytest.mark.parametrize("around", [Around, Hidden])
@pytest.mark.parametrize(
    "options",
    [
        {"use_1x1_conv": True},
        {"encoder_norm": "smc", "decoder_norm": "smc"},
        {"extractor": "nafnet", "aggregator": "vit", "sample_size": 32},
    ],
    ids=str,
)
def test_every_convolution_may_be_inside_another_module(make_variant, square_image, options, around):
    vae = make_variant(**options)
    with torch.no_grad():
        expected = vae(square_image).sample
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, around(child))
    with torch.no_grad():
        torch.testing.assert_close(vae(square_image).sample, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae(square_image.double()).sample, expected, atol=1e-4, rtol=1e-4)
    if around is Around:
        with pytest.raises(ValueError, match="image must be on the model's device cpu, got meta"):
            vae.encode(square_image.to("meta"))
        with torch.no_grad():
            assert vae.bfloat16()(square_image).sample.dtype == torch.bfloat16


def test_the_adapter_methods_of_diffusers(make, image, tmp_path):
    def output():
        with torch.no_grad():
            return vae(image).sample

    vae = make()
    plain = output()
    config = LoraConfig(r=2, target_modules=["conv1", "conv2", "to_q", "conv_in"], init_lora_weights=False)
    torch.manual_seed(1)
    vae.add_adapter(config, "first")
    adapted = output()
    assert (adapted - plain).norm() > 1e-3 * plain.norm()
    assert vae.active_adapters() == ["first"]
    vae.disable_adapters()
    torch.testing.assert_close(output(), plain, atol=1e-4, rtol=1e-4)
    vae.enable_adapters()
    vae.fuse_lora()
    torch.testing.assert_close(output(), adapted, atol=1e-3, rtol=1e-3)
    vae.unfuse_lora()
    vae.save_lora_adapter(tmp_path, "first")

    vae = make()
    vae.load_lora_adapter(tmp_path, prefix=None, adapter_name="second", use_safetensors=True)
    torch.testing.assert_close(output(), adapted, atol=1e-4, rtol=1e-4)
    vae.delete_adapters("second")
    assert torch.equal(output(), plain)
