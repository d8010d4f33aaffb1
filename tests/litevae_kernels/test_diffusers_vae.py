import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litevae_kernels import diffusers_vae, use_backend
from litevae_kernels.accelerate import accelerate_vae
from litevae_kernels.backend import triton_installed
from litevae_kernels.diffusers_vae import Box, apply_norm, why_called
from litevae_kernels.group_norm_silu import group_norm_silu
from litevae_kernels.testing import gpu_calls

# What reaches the norms and convolutions has passed the same number of roundings as in diffusers' model. In bfloat16
# the convolution's own error is up to 2.5 times that of a direct one (conv3x3.h); in float32 a result may differ by
# 2e-5 of its norm from the direct convolution's.
FACTOR, LEAST = 2.5, 2e-5


def inputs(vae: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Makes images and latents."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    return images.to(dtype), torch.randn(2, vae.config.latent_channels, 16, 16).to(dtype)


def outputs(vae: Any, images: Tensor, latents: Tensor) -> dict[str, Tensor]:
    return {"moments": vae.encode(images).latent_dist.parameters, "sample": vae.decode(latents).sample}


def accelerated(vae: Any) -> Any:
    copied = copy.deepcopy(vae)
    accelerate_vae(copied)
    return copied


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    norm = exact.norm()
    assert plain.shape == actual.shape
    assert plain.dtype == actual.dtype
    error, allowed = ((x.double() - exact).norm() / norm for x in (actual, plain))
    assert error <= max(FACTOR * allowed, LEAST), f"{what}: {error:.2g}, plain {allowed:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_outputs(make_vae, model, dtype):
    vae = make_vae(model).to(dtype)
    images, latents = inputs(vae, dtype)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            actual, plain = (outputs(m, images, latents) for m in (accelerated(vae), vae))
            exact = outputs(copy.deepcopy(vae).double(), images.double(), latents.double())
        for name, expected in exact.items():
            assert_as_exact(actual[name], plain[name], expected, f"{name}, gradients {gradients}")
            assert actual[name].is_contiguous()  # as the inputs are; diffusers' attention changes the layout


def test_float64_and_the_reference_backend_equal_diffusers(make_vae):
    vae = make_vae()
    for dtype, backend in ((torch.float64, "native"), (torch.float32, "reference")):
        vae.to(dtype)
        with use_backend(backend), torch.no_grad():
            both = [outputs(m, *inputs(vae, dtype)) for m in (accelerated(vae), vae)]
        for name in both[0]:
            tolerance = 1e4 * torch.finfo(dtype).eps if backend == "native" else LEAST
            assert (both[0][name] - both[1][name]).norm() <= tolerance * both[1][name].norm()


class HalfProducts(TorchDispatchMode):
    """Names the convolutions and matrix products that get half precision."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if any(part in name for part in ("aten::convolution", "mm", "linear")) and any(
            isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in tree_leaves(args)
        ):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("without_half_on_any_architecture")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_float32_by_a_cpu_without_it(make_vae, dtype):
    vae = make_vae().to(dtype)
    with torch.no_grad(), HalfProducts() as plain:
        outputs(vae, *inputs(vae, dtype))
    assert {"aten::convolution", "aten::addmm"} <= plain.names
    with torch.no_grad(), HalfProducts() as seen:
        outputs(accelerated(vae), *inputs(vae, dtype))
    assert not seen.names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(make_vae, checkpointing):
    vae = make_vae()
    every: dict[str, dict[str, Tensor]] = {}
    for kind in ("ours", "plain", "exact"):
        model = accelerated(vae) if kind == "ours" else copy.deepcopy(vae)
        dtype = torch.float64 if kind == "exact" else torch.float32
        model.to(dtype).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        leaves = [x.requires_grad_() for x in inputs(vae, dtype)]
        sum((y * y).mean() for y in outputs(model, *leaves).values()).backward()
        every[kind] = {name: p.grad for name, p in model.named_parameters()}
        every[kind] |= {f"input {i}": x.grad for i, x in enumerate(leaves)}
    for name, exact in every["exact"].items():
        if exact.norm() > 1e-9:  # A key's bias has no influence: its gradient is rounding.
            assert_as_exact(every["ours"][name], every["plain"][name], exact, name)


def test_recomputation_uses_the_backend_of_the_forward_pass(make_vae):
    vae = accelerated(make_vae()).train()
    vae.enable_gradient_checkpointing()
    with use_backend("reference"):
        y = vae.decode(inputs(vae)[1]).sample
    y.mean().backward()  # Another backend saves other tensors, which PyTorch would notice.
    assert vae.decoder.conv_in.weight.grad.norm() > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_whole(make_vae, gradients):
    torch._dynamo.reset()
    vae = accelerated(make_vae())
    with torch.set_grad_enabled(gradients):
        expected = outputs(vae, *inputs(vae))
        compiled = torch.compile(lambda *x: outputs(vae, *x), fullgraph=True, backend="aot_eager")
        actual = compiled(*inputs(vae))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=LEAST, rtol=LEAST)
        assert actual[name].requires_grad == gradients


def test_autocast_and_layouts(make_vae):
    vae = make_vae()
    ours = accelerated(vae)
    images, latents = inputs(vae)
    with torch.no_grad():
        exact = outputs(copy.deepcopy(vae).double(), images.double(), latents.double())
        with torch.autocast("cpu", torch.bfloat16):
            actual, plain = (outputs(m, images, latents) for m in (ours, vae))
        for name, expected in exact.items():
            assert_as_exact(actual[name], plain[name], expected, name)
        inside: list[Tensor] = []
        ours.decoder.up_blocks[0].register_forward_hook(lambda _, args, y: inside.extend([*args, y]))
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = ours.decode(latents.contiguous(memory_format=memory_format)).sample
            assert y.is_contiguous(memory_format=memory_format)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inside)


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_what_a_hook_keeps_is_not_overwritten(make_vae, kind):
    """The norms overwrite what only the decoder refers to; a hook on any module may keep its inputs and outputs."""
    vae = accelerated(make_vae())
    images, latents = inputs(vae)
    with torch.no_grad():
        expected = outputs(vae, images, latents)
        for name, module in vae.named_modules():
            kept: list[tuple[Tensor, Tensor]] = []

            def keep(_: nn.Module, *values: Any, kept: Any = kept) -> None:
                kept.extend((x, x.clone()) for x in tree_leaves(values) if isinstance(x, Tensor))

            register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
            handle = register(keep)
            actual = outputs(vae, images, latents)
            handle.remove()
            assert kept or not name or isinstance(module, nn.ModuleList | nn.Dropout | nn.Identity), name
            assert all(torch.equal(now, then) for now, then in kept), name
            for key, value in expected.items():
                assert (actual[key] - value).norm() <= LEAST * value.norm(), name
        latents_before, images_before = latents.clone(), images.clone()
        outputs(vae, images, latents)
    assert torch.equal(latents, latents_before)
    assert torch.equal(images, images_before)


class Live(TorchDispatchMode):
    """Records the peak of the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = t.untyped_storage()
            if storage._cdata not in self.known | inside:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out


def test_decode_needs_seven_tenths_of_the_memory(make_vae):
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = make_vae(block_out_channels=(32, 64, 64), down_block_types=down, up_block_types=up)
    vae.to(memory_format=torch.channels_last)  # The layout in which diffusers' model needs least.
    latents = torch.randn(1, 4, 32, 32).contiguous(memory_format=torch.channels_last)
    peaks = []
    for model in (accelerated(vae), vae):
        with torch.no_grad(), Live() as live:
            model.decode(latents)
        peaks.append(live.peak)
    assert peaks[0] <= 0.7 * peaks[1]


def test_layers_that_are_called():
    assert why_called(nn.Conv2d(1, 1, 1), nn.Conv2d) is None
    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda *_: None)
    own = nn.SiLU()
    own.forward = lambda x: x
    on_its_own = nn.SiLU()
    on_its_own.compile(backend="eager")
    backward = nn.SiLU()
    backward.register_full_backward_hook(lambda *_: None)
    for module, reason in (
        (nn.ReLU(), "is a ReLU"),
        (hooked, "has hooks"),
        (backward, "has hooks"),
        (own, "has a forward of its own"),
        (on_its_own, "is compiled on its own"),
    ):
        assert reason in why_called(module, nn.SiLU)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why_called(nn.SiLU(), nn.SiLU) == "has hooks"
    finally:
        handle.remove()


def test_norms_overwrite_only_what_is_ours_and_without_gradients():
    norm, silu = nn.GroupNorm(4, 8), nn.SiLU()
    for ours, gradients in itertools.product((False, True), (False, True)):
        x = torch.randn(1, 8, 16, 16)
        before = x.clone()
        with torch.set_grad_enabled(gradients):
            y = apply_norm(norm, silu, x, ours=ours)
            torch.testing.assert_close(y, silu(norm(before)), atol=1e-5, rtol=1e-5)
        assert torch.equal(x, before) != (ours and not gradients)


def test_a_box_keeps_nothing_that_was_taken():
    box = Box(torch.ones(1), ours=True)
    reference = weakref.ref(box.take())
    assert reference() is None
    box.put(torch.zeros(1), ours=False)
    assert not box.ours
    assert box.take() == 0


class Around(nn.Module):
    """Stands for a convolution by its constructor and its forward alone."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.skipif(not triton_installed, reason="needs Triton")
def test_a_block_s_biases_have_no_pass_of_their_own_on_a_gpu(make_vae):
    """As in LiteVAE's ResBlock, the norm adds the first bias, and one addition the second bias and the residual."""

    def with_bias(calls: list[tuple[str, tuple[Any, ...]]]) -> list[bool]:
        return [args[2] is not None for name, args in calls if name == "aten::convolution"]

    block, x = accelerated(make_vae()).decoder.mid_block.resnets[0], torch.empty(2, 64, 4, 4)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_add_a_bias_change_no_result(make_vae, monkeypatch, dtype):
    """The kernels for the CPU take an offset as those for a GPU do."""
    vae = make_vae().to(dtype)
    monkeypatch.setattr(diffusers_vae, "norm_adds_bias", lambda x: True)
    deferred: list[Tensor] = []

    def norm(*args: Any, offset: Tensor | None, **kwargs: Any) -> Tensor:
        deferred.extend([] if offset is None else [offset])
        return group_norm_silu(*args, offset=offset, **kwargs)

    monkeypatch.setattr(diffusers_vae, "group_norm_silu", norm)
    with torch.no_grad():
        actual, plain = (outputs(m, *inputs(vae, dtype)) for m in (accelerated(vae), vae))
        exact = outputs(copy.deepcopy(vae).double(), *(x.double() for x in inputs(vae, dtype)))
    assert len(deferred) == sum(isinstance(m, ResnetBlock2D) for m in vae.modules())
    for name, expected in exact.items():
        assert_as_exact(actual[name], plain[name], expected, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_convolution_may_be_inside_another_module(make_vae, when):
    vae = make_vae()
    images, latents = inputs(vae)
    with torch.no_grad():
        expected = outputs(vae, images, latents)
    if when == "after":
        accelerate_vae(vae)
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, Around(child))
    report = accelerate_vae(vae)
    assert not report.fused["3x3 convolution"]
    assert report.left["decoder.conv_in"] == "is a Around"
    with torch.no_grad():
        actual = outputs(vae, images, latents)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
