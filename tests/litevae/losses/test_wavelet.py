import numpy as np
import pytest
import pywt

from litevae.losses import wavelet_loss


def oracle(x, y):
    _, details_x = pywt.dwt2(x, "haar", mode="symmetric")
    _, details_y = pywt.dwt2(y, "haar", mode="symmetric")
    difference = np.stack(details_x) - np.stack(details_y)
    return np.sqrt(difference**2 + 1e-3**2).mean()


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 3, 9, 7), (3, 1, 8, 8)])
def test_equals_charbonnier_on_pywavelets_details(shape, pair):
    image, reconstruction = pair(shape)
    expected = oracle(image.numpy(), reconstruction.numpy())
    np.testing.assert_allclose(wavelet_loss(image, reconstruction), expected, rtol=1e-12)
    np.testing.assert_allclose(wavelet_loss(image.float(), reconstruction.float()), expected, rtol=1e-5)
