"""Fused wavelet, convolution and normalisation operators for PyTorch."""

from litevae_kernels.backend import use_backend
from litevae_kernels.haar import haar_dwt2d, haar_idwt2d, haar_pyramid, wavedec2, waverec2

__all__ = ["haar_dwt2d", "haar_idwt2d", "haar_pyramid", "use_backend", "wavedec2", "waverec2"]
