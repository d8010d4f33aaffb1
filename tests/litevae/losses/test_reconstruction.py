import numpy as np
import pytest

from litevae.losses import l1_loss, l2_loss


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (1, 3, 9, 7), (3, 1, 8, 8)])
@pytest.mark.parametrize(("loss", "power"), [(l1_loss, 1), (l2_loss, 2)])
def test_equals_the_formula(loss, power, shape, pair):
    image, reconstruction = pair(shape)
    expected = (np.abs(image.numpy() - reconstruction.numpy()) ** power).mean()
    np.testing.assert_allclose(loss(image, reconstruction), expected, rtol=1e-12)
    np.testing.assert_allclose(loss(image.float(), reconstruction.float()), expected, rtol=1e-5)
