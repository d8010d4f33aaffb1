"""Properties of all losses between two images that use no network."""

import pytest
import torch

from litevae.losses import gaussian_loss, l1_loss, l2_loss, wavelet_loss

LOSSES = [l1_loss, l2_loss, wavelet_loss, gaussian_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences(loss, pair):
    image, reconstruction = pair((1, 2, 4, 6))
    assert torch.autograd.gradcheck(lambda x: loss(image, x), reconstruction.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_have_a_finite_gradient(loss, dtype, pair):
    image = pair((1, 3, 8, 8))[0].to(dtype)
    reconstruction = image.clone().requires_grad_()
    value = loss(image, reconstruction)
    value.backward()
    assert value.item() == pytest.approx(1e-3 if loss is wavelet_loss else 0, rel=1e-6, abs=1e-12)
    assert reconstruction.grad.count_nonzero() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_a_mean_per_element(loss, pair):
    image, reconstruction = pair((1, 3, 16, 16))
    once = loss(image, reconstruction)
    torch.testing.assert_close(loss(image.tile(4, 2, 1, 1), reconstruction.tile(4, 2, 1, 1)), once)


@pytest.mark.parametrize(("loss", "at_zero"), [(gaussian_loss, 0), (wavelet_loss, 1e-3)])
def test_high_frequency_losses_ignore_a_constant_shift(loss, at_zero, pair):
    image, _ = pair((1, 3, 8, 8))
    assert loss(image, image + 0.5).item() == pytest.approx(at_zero, abs=1e-12)
