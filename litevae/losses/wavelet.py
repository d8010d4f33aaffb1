"""The wavelet loss of Section 4.2."""

from torch import Tensor

from litevae_kernels import haar_dwt2d


def wavelet_loss(image: Tensor, reconstruction: Tensor, eps: float = 1e-3) -> Tensor:
    """Charbonnier loss sqrt(d² + eps²) on the H, V and D sub-bands of one orthonormal Haar transform.

    Args:
        image, reconstruction: (N, C, H, W).
        eps: where the loss turns from quadratic to linear; 1e-3 as in LapSRN (Lai et al., 2018), which
            the term's citations use. It is also the loss of equal images.

    Returns:
        A scalar, the mean over the 3·N·C·⌈H/2⌉·⌈W/2⌉ coefficients.
    """
    # the transform is linear, so one of the difference serves for both
    details = haar_dwt2d(reconstruction - image)[:, image.shape[1] :]
    return (details.square() + eps**2).sqrt().mean()
