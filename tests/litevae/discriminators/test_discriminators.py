"""Properties of all discriminators, and `build_discriminator`."""

import copy
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from litevae.discriminators import (
    DiscriminatorConfig,
    PatchGANDiscriminator,
    StyleGANDiscriminator,
    UNetDiscriminator,
    build_discriminator,
)

KINDS = ["unet", "patchgan", "stylegan"]
# With few channels, the layers are the same as at full width.
SMALL = {
    "unet": partial(UNetDiscriminator, channels=4),
    "patchgan": lambda size: PatchGANDiscriminator(channels=4),
    "stylegan": partial(StyleGANDiscriminator, channels=1),
}


def small(kind, size=64, seed=0):
    torch.manual_seed(seed)
    return SMALL[kind](size)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mean_of(heads):
    return sum(head.mean() for head in heads)


def head_shapes(kind, n, height, width):
    return {
        "unet": [(n, 1, height, width), (n, 1)],
        "patchgan": [(n, 1, height // 8 - 2, width // 8 - 2)],
        "stylegan": [(n, 1)],
    }[kind]


def gradients(discriminator):
    return torch.cat([parameter.grad.flatten() for parameter in discriminator.parameters()])


@pytest.mark.parametrize("built_for", [64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_one_module_takes_64_to_512_with_finite_gradients(kind, built_for):
    discriminator = small(kind, built_for)
    for n, height, width in [(2, 64, 64), (4, 128, 128), (1, 256, 256), (1, 512, 512), (2, 64, 192)]:
        image = images(n, 3, height, width).requires_grad_()
        heads = discriminator(image)
        assert [tuple(head.shape) for head in heads] == head_shapes(kind, n, height, width)
        discriminator.zero_grad()
        mean_of(heads).backward()
        assert image.grad.isfinite().all()
        assert image.grad.any()
        assert gradients(discriminator).isfinite().all()


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_of_one_colour_have_finite_gradients(kind, value):
    discriminator = small(kind)
    image = torch.full((4, 3, 64, 64), value, requires_grad=True)
    mean_of(discriminator(image)).backward()
    assert image.grad.isfinite().all()
    assert gradients(discriminator).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_real_and_generated_images_share_one_backward_pass(kind):
    """The gradient equals that of two backward passes: the second forward pass does not affect the first."""
    together, apart = small(kind).double(), small(kind).double()
    real, generated = (images(4, 3, 64, 64, seed=seed).double() for seed in (1, 2))
    logits = together(real), together(generated)
    (mean_of(logits[1]) - mean_of(logits[0])).backward()
    (-mean_of(apart(real))).backward()
    mean_of(apart(generated)).backward()
    torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_generator_step_through_frozen_parameters(kind):
    discriminator = small(kind)
    generated = images(2, 3, 64, 64).requires_grad_()
    expected = torch.autograd.grad(mean_of(copy.deepcopy(discriminator)(generated)), generated)[0]
    discriminator.requires_grad_(False)
    mean_of(discriminator(generated)).backward()
    torch.testing.assert_close(generated.grad, expected)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_gradient_penalty_is_finite(kind):
    """R1 (Mescheder et al., 2018), which StyleGAN2's training uses, differentiates twice."""
    discriminator = small(kind)
    real = images(2, 3, 64, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(mean_of(discriminator(real)), real, create_graph=True)
    gradient.square().sum().backward()
    weights = [p for p in discriminator.parameters() if p.ndim > 1]
    assert all(weight.grad.isfinite().all() for weight in weights)
    assert any(weight.grad.any() for weight in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    torch._dynamo.reset()
    discriminator = small(kind).double()
    eager = copy.deepcopy(discriminator)
    compiled = torch.compile(discriminator, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):  # the second call reads the buffers that the first wrote
        image = images(4, 3, 64, 64, seed=seed).double()
        mean_of(compiled(image)).backward()
        mean_of(eager(image)).backward()
    torch.testing.assert_close(gradients(discriminator), gradients(eager), rtol=1e-9, atol=1e-12)
    for buffer, expected in zip(discriminator.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_stays_near_float64(kind):
    discriminator = small(kind)
    exact_discriminator = copy.deepcopy(discriminator).double()
    image = images(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        heads = discriminator(image)
    mean_of(heads).backward()
    exact_heads = exact_discriminator(image.double())
    # Two dozen layers have relative rounding errors of 2^-9 at most: 0.05 if all have the same sign.
    for head, exact in zip(heads, exact_heads, strict=True):
        assert head.dtype == torch.bfloat16
        assert (head.double() - exact).norm() <= 0.05 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_is_kept_and_changes_nothing(kind):
    discriminator = small(kind)
    image = images(4, 3, 64, 96)
    expected = copy.deepcopy(discriminator)(image)
    kept = []
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, i, output: kept.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    discriminator.to(memory_format=torch.channels_last)
    heads = discriminator(image.contiguous(memory_format=torch.channels_last))
    assert kept
    assert all(kept)
    torch.testing.assert_close(heads, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_depend_on_the_global_seed_alone(kind):
    first, same, other = (small(kind, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_restores_the_outputs(kind):
    saved, fresh = small(kind), small(kind, seed=1)
    image = images(4, 3, 64, 64)
    saved(image)  # updates the buffers
    fresh.load_state_dict(saved.state_dict())
    torch.testing.assert_close(fresh(image), saved(image), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_to_tell_sharp_from_blurred(kind):
    discriminator = small(kind)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    sharp = images(4, 3, 64, 64)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    losses = []
    for _ in range(20):
        real, generated = discriminator(sharp), discriminator(blurred)
        loss = mean_of((1 - r).relu() for r in real) + mean_of((1 + g).relu() for g in generated)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # This is half the loss of a discriminator that returns 0.
    assert losses[-1] < min(losses[0], len(real))


class TestBuild:
    @pytest.mark.parametrize(
        ("kind", "width", "make"),
        [
            ("unet", "S", lambda: UNetDiscriminator(64, 32)),
            ("patchgan", "S", lambda: PatchGANDiscriminator(32)),
            ("patchgan", "M", lambda: PatchGANDiscriminator()),
            ("patchgan", "L", lambda: PatchGANDiscriminator(128)),
            ("stylegan", "M", lambda: StyleGANDiscriminator(64)),
        ],
    )
    def test_kinds_and_widths(self, kind, width, make):
        built, expected = build_discriminator(DiscriminatorConfig(kind, width), 64), make()
        assert type(built) is type(expected)
        assert [p.shape for p in built.parameters()] == [p.shape for p in expected.parameters()]

    def test_config_reads_from_omegaconf(self):
        config = OmegaConf.structured(DiscriminatorConfig)
        config.merge_with({"kind": "stylegan", "width": "S"})
        assert OmegaConf.to_object(config) == DiscriminatorConfig("stylegan", "S")

    @pytest.mark.parametrize(
        ("config", "size", "message"),
        [
            (DiscriminatorConfig("vit"), 64, "unet, patchgan, stylegan, got 'vit'"),
            (DiscriminatorConfig("unet", "XL"), 64, "S, M, L, got 'XL'"),
            (DiscriminatorConfig("unet"), 0, "1 or more, got 0"),
            (DiscriminatorConfig("patchgan"), 16, "at least 24 pixels a side, got 16x16"),
            (DiscriminatorConfig("stylegan"), 200, "multiples of 32, got 200x200"),
            (DiscriminatorConfig("stylegan"), 4, "8 or more, got 4"),
        ],
    )
    def test_bad_settings_are_named(self, config, size, message):
        with pytest.raises(ValueError, match=message):
            build_discriminator(config, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_channel_is_looked_at(kind, channels):
    torch.manual_seed(0)
    discriminator = build_discriminator(DiscriminatorConfig(kind, "S"), 64, in_channels=channels)
    image = images(4, channels, 64, 64).requires_grad_()
    mean_of(discriminator(image)).backward()
    assert (image.grad.abs().amax((0, 2, 3)) > 0).all()
