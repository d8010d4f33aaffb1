import numpy as np
import pytest
from scipy import ndimage

from litevae.losses import gaussian_loss


def high(image):
    # SciPy's "mirror" is PyTorch's "reflect"; radius 2 is 5x5
    return image - ndimage.gaussian_filter(image, sigma=1, radius=2, axes=(2, 3), mode="mirror")


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 3, 9, 7), (3, 1, 8, 8)])
def test_equals_scipys_filter(shape, pair):
    image, reconstruction = pair(shape)
    expected = np.abs(high(image.numpy()) - high(reconstruction.numpy())).mean()
    np.testing.assert_allclose(gaussian_loss(image, reconstruction), expected, rtol=1e-12)
    np.testing.assert_allclose(gaussian_loss(image.float(), reconstruction.float()), expected, rtol=1e-5)
