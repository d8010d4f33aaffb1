"""Tests of the U-Net discriminator against its layer table and a plain float64 forward pass."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from litevae.discriminators import UNetDiscriminator
from litevae.discriminators.unet import SpectralNorm, normalised


def small(size=128, channels=4):
    torch.manual_seed(0)
    return UNetDiscriminator(size, channels)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


# Input and output channels of every block, as multiples of the width; the image has three channels. A block of the
# decoder path gets the output of the coarser block and that of the encoder block at its own resolution.
TABLE_128 = {
    "down": [("rgb", 1), (1, 2), (2, 4), (4, 8), (8, 16)],
    "up": [(16, 8), (8 + 8, 4), (4 + 4, 2), (2 + 2, 1), (1 + 1, 1)],
}
TABLE_256 = {
    "down": [("rgb", 1), (1, 2), (2, 4), (4, 8), (8, 8), (8, 16)],
    "up": [(16, 8), (8 + 8, 8), (8 + 8, 4), (4 + 4, 2), (2 + 2, 1), (1 + 1, 1)],
}


def expected_count(table, channels):
    count = (16 * channels + 1) + (channels + 1)  # the two heads
    for before, after in [*table["down"], *table["up"]]:
        i, o = 3 if before == "rgb" else before * channels, after * channels
        count += (9 * i * o + o) + (9 * o * o + o) + (i * o + o)
    return count


@pytest.mark.parametrize(
    ("size", "table", "channels"),
    [
        (128, TABLE_128, 32),
        (128, TABLE_128, 64),
        (128, TABLE_128, 128),
        (256, TABLE_256, 64),
        (64, TABLE_128, 4),
        (248, TABLE_128, 4),
        (512, TABLE_256, 4),
    ],
)
def test_parameter_count(size, table, channels):
    with torch.device("meta"):
        discriminator = UNetDiscriminator(size, channels)
    assert sum(p.numel() for p in discriminator.parameters()) == expected_count(table, channels)


def plain_forward(discriminator, image):
    """Computes the network in the paper's order: 1x1 convolutions after upsampling and before pooling."""

    def conv(layer, x):
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    x, outputs = image, []
    for i, block in enumerate(discriminator.down_blocks):
        h = x if i == 0 else x.relu()
        h = conv(block.conv2, conv(block.conv1, h).relu())
        x = F.avg_pool2d(h + conv(block.conv_shortcut, x), 2)
        outputs.append(x)
    head = discriminator.bottleneck_head
    whole = F.linear(x.relu().sum((2, 3)), head.weight, head.bias)
    for i, block in enumerate(discriminator.up_blocks):
        if i > 0:
            x = torch.cat([x, outputs[-1 - i]], dim=1)
        up = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(block.conv2, conv(block.conv1, up.relu()).relu()) + conv(block.conv_shortcut, up)
    return conv(discriminator.pixel_head, x.relu()), whole


@pytest.mark.parametrize("size", [128, 256])
def test_outputs_equal_a_plain_forward_pass(size):
    discriminator = small(size).double().eval()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # makes the biases non-zero
    image = images(1, 3, size, size)
    torch.testing.assert_close(
        discriminator(image), plain_forward(discriminator, image), rtol=1e-9, atol=1e-9
    )


def test_every_layer_is_spectrally_normalised_and_starts_orthogonal():
    discriminator = small()
    layers = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 3 * 10 + 2
    for layer in layers:
        assert isinstance(layer.parametrizations.weight[0], SpectralNorm)
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-5, atol=0)
        assert not layer.bias.any()


def test_power_iteration_follows_the_weights():
    """Some forward passes after a change, the layers' largest singular value (from LAPACK) is 1 again."""
    discriminator = small()
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            if name.endswith("original"):
                parameter.copy_(torch.randn_like(parameter))
    for _ in range(60):
        discriminator(images(1, 3, 8, 8).float())
    discriminator.eval()
    for layer in (discriminator.down_blocks[2].conv1, discriminator.up_blocks[1].conv_shortcut):
        # The estimate approaches the value from below, as (second / first)^(2 · 60).
        values = torch.linalg.svdvals(layer.parametrizations.weight.original.detach().flatten(1))
        bound = 1 / (1 - (values[1] / values[0]) ** 120) + 1e-4
        assert 1 - 1e-4 <= torch.linalg.matrix_norm(layer.weight.flatten(1), 2) <= bound


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_spectral_norm_is_pytorchs(memory_format):
    """Results and gradients equal those of torch's spectral_norm once both have converged."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Conv2d(5, 7, 3, padding=1).double() for _ in range(2))
    normalised(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        theirs.weight.copy_(ours.parametrizations.weight.original)
        theirs.bias.copy_(ours.bias)
    ours.to(memory_format=memory_format)
    theirs = spectral_norm(theirs, n_power_iterations=1000)
    x = images(2, 5, 8, 6).requires_grad_()
    for _ in range(1000):
        ours(x)
    results = []
    for layer in (ours, theirs):
        y, weight = layer(x), layer.parametrizations.weight.original
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, layer.bias])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_spectral_norm_before_it_has_found_the_singular_value(memory_format):
    """The oracle is autograd of the definition, with the vectors of one step of the power iteration."""
    weight = images(7, 5, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
    norm = SpectralNorm(weight).train()
    u, grad = norm.u.clone(), images(7, 5, 3, 3).flip(0)
    actual = norm(weight)
    matrix = weight.flatten(1)
    v = F.normalize(matrix.T @ u, dim=0).detach()
    u = F.normalize(matrix @ v, dim=0).detach()
    expected = weight / (u @ matrix @ v)
    torch.testing.assert_close(norm.u, u)
    assert actual.stride() == weight.stride()
    torch.testing.assert_close(actual, expected)
    for each in (grad, grad.contiguous(memory_format=torch.channels_last), grad[:1].expand_as(grad)):
        found = [torch.autograd.grad(y, weight, each, retain_graph=True)[0] for y in (actual, expected)]
        torch.testing.assert_close(*found)


def test_spectral_norm_of_two_passes_with_one_backward_pass():
    """The backward pass of the first call uses its own vectors, not those of the second call."""
    layer = normalised(torch.nn.Linear(4, 3)).double()
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    x = images(2, 4)
    together, apart = copy.deepcopy(layer), copy.deepcopy(layer)
    (together(x).square().sum() + together(-x).pow(3).sum()).backward()
    apart(x).square().sum().backward()
    apart(-x).pow(3).sum().backward()
    gradients = [each.parametrizations.weight.original.grad for each in (together, apart)]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_evaluation_leaves_the_power_iteration_alone():
    discriminator = small().eval()
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    discriminator(images(1, 3, 32, 32).float())
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (33, 65), (100, 72)])
def test_any_size(height, width):
    image = images(2, 3, height, width).float().requires_grad_()
    pixels, whole = small()(image)
    assert pixels.shape == (2, 1, height, width)
    assert whole.shape == (2, 1)
    (pixels.mean() + whole.mean()).backward()
    assert image.grad.isfinite().all()


def test_logits_of_the_bottleneck_keep_their_scale_at_other_sizes():
    """With periodic borders, an image that is repeated twice in each direction has the same features."""
    discriminator = small().double().eval()
    with torch.no_grad():
        for module in discriminator.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.forward = partial(torch.nn.Conv2d.forward, module)  # Conv3x3 pads with zeros only
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [module.padding[0]] * 4
    image = images(1, 3, 128, 128)
    pixels, whole = discriminator(image)
    tiled_pixels, tiled_whole = discriminator(image.tile(1, 1, 2, 2))
    torch.testing.assert_close(tiled_whole, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tiled_pixels, pixels.tile(1, 1, 2, 2), rtol=1e-9, atol=1e-9)
