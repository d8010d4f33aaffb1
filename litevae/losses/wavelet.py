"""The wavelet loss of Section 4.3."""

from torch import Tensor

from litevae_kernels import haar_dwt2d


def wavelet_loss(image: Tensor, reconstruction: Tensor, eps: float = 1e-3) -> Tensor:
    """Returns the Charbonnier loss sqrt(d² + eps²) on the H, V and D sub-bands of an orthonormal Haar transform.

    Args:
        image, reconstruction: images (N, C, H, W).
        eps: scale at which the loss turns from quadratic to linear, which is also the loss of equal images.
            The paper gives none; 1e-3 is that of LapSRN (Lai et al., 2018).

    Returns:
        A scalar, the mean over the 3·N·C·⌈H/2⌉·⌈W/2⌉ coefficients.
    """
    # The transform is linear, so transforming the difference is enough.
    details = haar_dwt2d(reconstruction - image)[:, image.shape[1] :]
    return (details.square() + eps**2).sqrt().mean()
