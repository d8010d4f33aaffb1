"""Tests of PatchGAN against its layer table, a plain forward pass and its receptive field."""

import pytest
import torch
import torch.nn.functional as F

from litevae.discriminators import PatchGANDiscriminator


def small():
    torch.manual_seed(0)
    return PatchGANDiscriminator(channels=8)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def expected_count(channels, image_channels=3):
    c = channels
    first = 16 * image_channels * c + c
    # BatchNorm's weight and bias replace the convolution's bias.
    rest = (16 * c * 2 * c + 2 * 2 * c) + (16 * 2 * c * 4 * c + 2 * 4 * c) + (16 * 4 * c * 8 * c + 2 * 8 * c)
    return first + rest + (16 * 8 * c + 1)


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_parameter_count(channels):
    with torch.device("meta"):
        discriminator = PatchGANDiscriminator(channels)
    assert sum(p.numel() for p in discriminator.parameters()) == expected_count(channels)


def test_published_parameter_count():
    # pix2pix prints 2.769 M, because its input has six channels: the input and the output image.
    assert expected_count(64, image_channels=6) == 2_768_705
    assert sum(p.numel() for p in PatchGANDiscriminator().parameters()) == 2_765_633


def test_outputs_equal_a_plain_forward_pass():
    discriminator = small().double()
    image = images(3, 3, 40, 56)
    tensors = [p.detach() for p in discriminator.parameters()]
    x = F.leaky_relu(F.conv2d(image, tensors[0], tensors[1], stride=2, padding=1), 0.2)
    for i, stride in ((2, 2), (5, 2), (8, 1)):
        x = F.conv2d(x, tensors[i], stride=stride, padding=1)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = F.leaky_relu(x * tensors[i + 1].view(-1, 1, 1) + tensors[i + 2].view(-1, 1, 1), 0.2)
    expected = F.conv2d(x, tensors[11], tensors[12], padding=1)
    torch.testing.assert_close(discriminator(image), (expected,), rtol=1e-9, atol=1e-12)


def test_receptive_field_is_70_pixels():
    discriminator = small().double().eval()  # in training mode BatchNorm connects all patches
    image = images(1, 3, 160, 160).requires_grad_()
    (logits,) = discriminator(image)
    logits[0, 0, 9, 9].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_initial_weights():
    torch.manual_seed(0)
    discriminator = PatchGANDiscriminator()
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d):
            expected_mean = 0.0
        elif isinstance(module, torch.nn.BatchNorm2d):
            expected_mean = 1.0
        else:
            continue
        # The bounds are 5 standard errors of the mean and of the standard deviation.
        n = module.weight.numel()
        assert abs(module.weight.mean().item() - expected_mean) < 5 * 0.02 / n**0.5
        assert abs(module.weight.std().item() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(("height", "width"), [(23, 64), (64, 8)])
def test_too_small_an_image_is_named(height, width):
    with pytest.raises(ValueError, match=f"at least 24 pixels a side, got {height}x{width}"):
        small()(images(2, 3, height, width).float())


@pytest.mark.parametrize(("height", "width"), [(24, 24), (31, 50)])
def test_smallest_and_odd_sizes(height, width):
    (logits,) = small()(images(2, 3, height, width).float())
    assert logits.shape == (2, 1, height // 8 - 2, width // 8 - 2)
