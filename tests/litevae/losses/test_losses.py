"""Each loss against a formula in float64 that NumPy, SciPy or PyWavelets computes."""

import numpy as np
import pytest
import pywt
import torch
from scipy import ndimage

from litevae.losses import LossWeights, Objective, gaussian_loss, kl_loss, l1_loss, wavelet_loss

SHAPES = [(2, 3, 16, 24), (1, 3, 9, 7), (3, 1, 8, 8)]
IMAGE_LOSSES = [l1_loss, wavelet_loss, gaussian_loss]


def pair(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1 for _ in "ab")


def l1_oracle(x, y):
    return np.abs(x - y).mean()


def wavelet_oracle(x, y):
    _, details_x = pywt.dwt2(x, "haar", mode="symmetric")
    _, details_y = pywt.dwt2(y, "haar", mode="symmetric")
    difference = np.stack(details_x) - np.stack(details_y)
    return np.sqrt(difference**2 + 1e-3**2).mean()


def gaussian_oracle(x, y):
    def high(image):
        # SciPy's "mirror" is PyTorch's "reflect"; radius 2 is 5x5
        return image - ndimage.gaussian_filter(image, sigma=1, radius=2, axes=(2, 3), mode="mirror")

    return np.abs(high(x) - high(y)).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [(l1_loss, l1_oracle), (wavelet_loss, wavelet_oracle), (gaussian_loss, gaussian_oracle)],
)
def test_image_loss_equals_the_formula(loss, oracle, shape):
    image, reconstruction = pair(shape)
    expected = oracle(image.numpy(), reconstruction.numpy())
    np.testing.assert_allclose(loss(image, reconstruction), expected, rtol=1e-12)
    np.testing.assert_allclose(loss(image.float(), reconstruction.float()), expected, rtol=1e-5)


def test_kl_equals_torch_distributions():
    mean, logvar = pair((2, 4, 3, 5))
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(kl_loss(mean, logvar), expected, rtol=1e-12, atol=0)


def test_kl_is_zero_at_the_prior():
    assert kl_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)) == 0


@pytest.mark.parametrize("loss", IMAGE_LOSSES)
def test_gradient_equals_finite_differences(loss):
    image, reconstruction = pair((1, 2, 4, 6))
    assert torch.autograd.gradcheck(lambda x: loss(image, x), reconstruction.requires_grad_())


@pytest.mark.parametrize("loss", IMAGE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_have_a_finite_gradient(loss, dtype):
    image, _ = pair((1, 3, 8, 8), dtype)
    reconstruction = image.clone().requires_grad_()
    value = loss(image, reconstruction)
    value.backward()
    assert value.item() == pytest.approx(1e-3 if loss is wavelet_loss else 0, rel=1e-6, abs=1e-12)
    assert reconstruction.grad.count_nonzero() == 0


@pytest.mark.parametrize("loss", IMAGE_LOSSES)
def test_loss_is_a_mean_per_element(loss):
    image, reconstruction = pair((1, 3, 16, 16))
    once = loss(image, reconstruction)
    torch.testing.assert_close(loss(image.tile(4, 2, 1, 1), reconstruction.tile(4, 2, 1, 1)), once)


def test_high_frequency_losses_ignore_a_constant_shift():
    image, _ = pair((1, 3, 8, 8))
    assert gaussian_loss(image, image + 0.5).item() == pytest.approx(0, abs=1e-12)
    assert wavelet_loss(image, image + 0.5).item() == pytest.approx(1e-3)


class TestObjective:
    weights = LossWeights(l1=1.0, kl=0.25, wavelet=2.0, gaussian=0.5)

    def inputs(self, dtype=torch.float32):
        return (*pair((2, 3, 16, 16), dtype), *pair((2, 4, 2, 2), dtype))

    def test_total_is_the_weighted_sum_of_unweighted_terms(self):
        image, reconstruction, mean, logvar = self.inputs()
        loss = Objective(self.weights)(image, reconstruction, mean, logvar)
        assert list(loss.terms) == ["l1", "kl", "wavelet", "gaussian"]
        torch.testing.assert_close(loss.terms["l1"], l1_loss(image, reconstruction))
        torch.testing.assert_close(loss.terms["kl"], kl_loss(mean, logvar))
        expected = sum(getattr(self.weights, name) * term for name, term in loss.terms.items())
        torch.testing.assert_close(loss.total, expected)

    def test_term_of_weight_zero_is_left_out(self):
        loss = Objective(LossWeights(l1=1, kl=0, wavelet=0, gaussian=0))(*self.inputs())
        assert list(loss.terms) == ["l1"]

    def test_gradient_reaches_reconstruction_and_posterior(self):
        image, *rest = self.inputs()
        rest = [tensor.requires_grad_() for tensor in rest]
        Objective(self.weights)(image, *rest).total.backward()
        assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in rest)

    def test_is_float32_under_autocast(self):
        inputs = self.inputs(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = Objective(self.weights)(*inputs)
        expected = Objective(self.weights)(*(tensor.float() for tensor in inputs))
        assert loss.total.dtype == torch.float32
        assert loss.total == expected.total
