"""Tests of LDL against NumPy, in float64."""

import numpy as np
import pytest
import torch

from litevae.losses import ldl_loss

SHAPES = [(2, 3, 16, 24), (1, 3, 9, 7), (3, 1, 8, 8)]


@pytest.fixture
def triple(pair):
    """Returns a function that makes image, reconstruction and EMA reconstruction, better in half the pixels."""

    def make(shape):
        image, reconstruction = pair(shape)
        factor = torch.tensor([0.5, 1.5], dtype=torch.float64).repeat(shape[-1])[: shape[-1]]
        return image, reconstruction, image + factor * (reconstruction - image)

    return make


def weight_oracle(x, y, z):
    residual, ema_residual = (np.abs(x - other).sum(axis=1) for other in (y, z))
    padded = np.pad(residual, ((0, 0), (3, 3), (3, 3)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
    of_image = np.array([image.var(ddof=1) for image in residual])[:, None, None]
    weight = of_image ** (1 / 5) * windows.var(axis=(3, 4), ddof=1)
    return np.where(residual < ema_residual, 0, weight)[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape, triple):
    image, reconstruction, ema = triple(shape)
    weight = weight_oracle(*(tensor.numpy() for tensor in (image, reconstruction, ema)))
    assert (weight == 0).any()
    assert (weight > 0).any()
    expected = (weight * np.abs(image.numpy() - reconstruction.numpy())).mean()
    np.testing.assert_allclose(ldl_loss(image, reconstruction, ema), expected, rtol=1e-12)
    np.testing.assert_allclose(
        ldl_loss(*(t.float() for t in (image, reconstruction, ema))), expected, rtol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_is_a_constant_to_the_gradient(shape, triple):
    image, reconstruction, ema = (tensor.requires_grad_() for tensor in triple(shape))
    ldl_loss(image, reconstruction, ema).backward()
    x, y, z = (tensor.detach().numpy() for tensor in (image, reconstruction, ema))
    expected = weight_oracle(x, y, z) * np.sign(y - x) / x.size
    np.testing.assert_allclose(reconstruction.grad, expected, rtol=1e-11)
    assert ema.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 0.25])  # a constant residual has no variance
def test_no_variance_has_a_zero_gradient(shift, dtype):
    image = torch.full((2, 3, 8, 8), 0.5, dtype=dtype)
    reconstruction = (image + shift).requires_grad_()
    loss = ldl_loss(image, reconstruction, image + shift)
    loss.backward()
    assert loss == 0
    assert reconstruction.grad.count_nonzero() == 0


def test_images_do_not_weigh_on_each_other(triple):
    images = triple((3, 3, 8, 8))
    alone = torch.stack([ldl_loss(*(tensor[i : i + 1] for tensor in images)) for i in range(3)])
    torch.testing.assert_close(ldl_loss(*images), alone.mean())
