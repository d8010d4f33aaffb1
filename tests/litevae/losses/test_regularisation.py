"""LeCam regularisation and R1 against NumPy and plain PyTorch in float64."""

import copy

import numpy as np
import pytest
import torch

from litevae.discriminators import StyleGANDiscriminator
from litevae.losses import LeCam, gradient_penalty
from litevae_kernels import use_backend


def logits(seed):
    """Returns the logits of images and of reconstructions, from one head per pixel and one per image."""
    generator = np.random.default_rng(seed)
    return [[generator.normal(size=shape) for shape in [(2, 1, 4, 5), (2, 1)]] for _ in range(2)]


def test_lecam_compares_logits_with_the_averages_of_earlier_steps():
    lecam, decay = LeCam(0.9), 0.9
    averages = None
    for step in range(4):
        real, fake = logits(step)
        tensors = [[torch.tensor(head, requires_grad=True) for head in each] for each in (real, fake)]
        term = lecam(*tensors)
        expected = 0.0
        if averages is not None:
            for head in range(2):
                expected += np.mean(np.maximum(real[head] - averages[1][head], 0) ** 2)
                expected += np.mean(np.maximum(averages[0][head] - fake[head], 0) ** 2)
        assert term.item() == pytest.approx(expected, rel=1e-12)
        term.backward()  # in the first step too
        means = [[head.mean() for head in each] for each in (real, fake)]
        averages = (
            means
            if averages is None
            else (decay * np.array(averages) + (1 - decay) * np.array(means)).tolist()
        )
        lecam.update(lecam.means())
        np.testing.assert_allclose(lecam.averages, averages, rtol=1e-12)


def test_lecam_averages_the_parts_of_a_step():
    lecam = LeCam(0.5)
    for value in (1.0, 3.0):
        lecam([torch.full((2, 1), value)], [torch.full((2, 1), -value)])
    torch.testing.assert_close(lecam.means(), torch.tensor([[2.0], [-2.0]]))


def test_gradient_penalty_is_the_squared_slope_at_each_image():
    torch.manual_seed(0)
    discriminator = StyleGANDiscriminator(16, 1)
    images = torch.rand(3, 3, 16, 16) * 2 - 1  # in an odd batch no image depends on another
    penalty = gradient_penalty(discriminator, images)
    slopes = torch.func.vmap(
        torch.func.grad(lambda image: discriminator(image[None])[0].sum()),
    )(images)
    torch.testing.assert_close(penalty, slopes.square().sum((1, 2, 3)).mean())


def test_gradient_penalty_has_the_gradients_of_plain_pytorch_in_float64():
    torch.manual_seed(0)
    discriminator = StyleGANDiscriminator(16, 1)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    gradient_penalty(discriminator, images).backward()
    found = {
        name: weight.grad for name, weight in discriminator.named_parameters() if weight.grad is not None
    }

    discriminator = copy.deepcopy(discriminator).double()
    discriminator.zero_grad()
    image = images.double().requires_grad_()
    with use_backend("reference"):
        (slope,) = torch.autograd.grad(discriminator(image)[0].sum(), image, create_graph=True)
        slope.square().sum((1, 2, 3)).mean().backward()
    assert any(gradient.any() for gradient in found.values())
    for name, weight in discriminator.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], weight.grad.float(), rtol=1e-4, atol=1e-8)
