"""Tests of StyleGAN2's discriminator against its layer table, SciPy's filters and a plain forward pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import signal

from litevae.discriminators import StyleGANDiscriminator
from litevae.discriminators.stylegan import Blur, EqualisedConv2d, EqualisedLinear, minibatch_std


def small(size=32, channels=1):
    torch.manual_seed(0)
    return StyleGANDiscriminator(size, channels)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


# Widths at each side, up to 512: half of config F of the paper, config F, and twice config F.
WIDTHS = {
    32: {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16},
    64: {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32},
    128: {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 512, 256: 256, 512: 128, 1024: 64},
}


def expected_count(widths, size):
    count = 3 * widths[size] + widths[size]
    while size > 4:
        i, o = widths[size], widths[size // 2]
        count += (9 * i * i + i) + (9 * i * o + o) + i * o
        size //= 2
    last = widths[4]
    count += 9 * (last + 1) * last + last  # the minibatch standard deviation adds a channel
    return count + (16 * last * last + last) + (last + 1)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_parameter_count(size, channels):
    with torch.device("meta"):
        discriminator = StyleGANDiscriminator(size, channels)
    assert sum(p.numel() for p in discriminator.parameters()) == expected_count(WIDTHS[channels], size)


def test_published_parameter_count():
    """The authors' code prints this number for config F at 1024 pixels."""
    assert expected_count(WIDTHS[64], 1024) == 29_012_513
    with torch.device("meta"):
        assert sum(p.numel() for p in StyleGANDiscriminator(1024).parameters()) == 29_012_513


def scipy_blur(x, padding, stride=1):
    """A full convolution pads by 3, so the excess is cropped before every `stride`-th sample is taken."""
    taps = np.array([1, 3, 3, 1]) / 8
    for axis in (2, 3):
        x = signal.upfirdn(taps, x, axis=axis)
        cut = [slice(None)] * 4
        cut[axis] = slice(3 - padding, x.shape[axis] - (3 - padding), stride)
        x = x[tuple(cut)]
    return x


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2)])
def test_blur_equals_scipy(padding, stride):
    image = images(2, 3, 8, 12)
    blurred = Blur(padding, stride).double()(image)
    np.testing.assert_allclose(blurred, scipy_blur(image.numpy(), padding, stride), rtol=1e-12, atol=1e-15)


def test_minibatch_std_equals_numpy():
    features = images(8, 5, 4, 4)
    channel = minibatch_std(features)
    assert channel.shape == (8, 1, 4, 4)
    for group in (slice(0, 4), slice(4, 8)):
        expected = np.sqrt(features[group].numpy().var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(channel[group], np.full((4, 1, 4, 4), expected), rtol=1e-12)


@pytest.mark.parametrize(("n", "group"), [(1, 1), (2, 2), (3, 1), (6, 2), (12, 4)])
def test_groups_of_the_minibatch_std(n, group):
    """A change in one image affects the images of its group and no others."""
    features = images(n, 2, 4, 4)
    changed = features.clone()
    changed[0] += images(2, 4, 4) * 3
    differs = (minibatch_std(features) != minibatch_std(changed)).flatten(1).any(1)
    assert differs.tolist() == [group > 1 and i < group for i in range(n)]


def plain_forward(discriminator, image):
    root2 = 2**0.5

    def weight(layer):
        return layer.weight / layer.weight[0].numel() ** 0.5

    def act(x):
        return torch.where(x > 0, x, 0.2 * x) * root2

    def blurred(x, padding, stride=1):
        return torch.from_numpy(scipy_blur(x.detach().numpy(), padding, stride))

    x = act(F.conv2d(image, weight(discriminator.from_rgb), discriminator.from_rgb.bias))
    for block in discriminator.blocks:
        h = act(F.conv2d(x, weight(block.conv1), block.conv1.bias, padding=1))
        h = act(F.conv2d(blurred(h, padding=2), weight(block.conv2), block.conv2.bias)[..., ::2, ::2])
        # The blur and the convolution have full size here; every second pixel is taken afterwards.
        skip = F.conv2d(blurred(x, padding=1), weight(block.conv_shortcut))[..., ::2, ::2]
        x = (h + skip) / root2
    std = np.sqrt(x.detach().numpy().var(axis=0) + 1e-8).mean()
    x = torch.cat([x, torch.full_like(x[:, :1], std)], dim=1)
    x = act(F.conv2d(x, weight(discriminator.conv_out), discriminator.conv_out.bias, padding=1))
    x = act(F.linear(x.flatten(1), weight(discriminator.linear1), discriminator.linear1.bias))
    return F.linear(x, weight(discriminator.linear2), discriminator.linear2.bias)


def test_outputs_equal_a_plain_forward_pass():
    discriminator = small().double()
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        image = images(4, 3, 32, 32)
        torch.testing.assert_close(
            discriminator(image), (plain_forward(discriminator, image),), rtol=1e-9, atol=1e-9
        )


def test_initial_weights_are_standard_normal():
    discriminator = small(64, 8)
    layers = [m for m in discriminator.modules() if isinstance(m, EqualisedConv2d | EqualisedLinear)]
    assert len(layers) == 1 + 3 * 4 + 1 + 2
    for layer in layers:
        n = layer.weight.numel()
        assert abs(layer.weight.mean().item()) < 5 / n**0.5
        assert abs(layer.weight.std().item() - 1) < 5 / (2 * n) ** 0.5
        assert layer.bias is None or not layer.bias.any()


def test_state_dict_holds_parameters_only():
    discriminator = small()
    assert list(discriminator.state_dict()) == [name for name, _ in discriminator.named_parameters()]


def test_real_and_generated_images_do_not_mix_in_one_batch():
    """A batch of groups of four consecutive images equals separate batches of the groups."""
    discriminator = small().double()
    real, generated = images(4, 3, 32, 32), images(4, 3, 32, 32) * 0.5
    together = discriminator(torch.cat([real, generated]))[0]
    apart = torch.cat([discriminator(real)[0], discriminator(generated)[0]])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [8, 24, 40, 96])
def test_first_size_need_not_be_a_power_of_two(size):
    (logits,) = small(size)(images(2, 3, size, 2 * size).float())
    assert logits.shape == (2, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 36), (20, 32)])
def test_size_that_does_not_fit_is_named(height, width):
    with pytest.raises(ValueError, match=f"multiples of 8, got {height}x{width}"):
        small(32)(images(1, 3, height, width).float())
