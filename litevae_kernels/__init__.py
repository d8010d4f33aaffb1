"""Fused wavelet, convolution and normalisation operators for PyTorch."""

from litevae_kernels.accelerate import accelerate_vae, restore_vae
from litevae_kernels.backend import use_backend
from litevae_kernels.conv3x3 import conv3x3
from litevae_kernels.group_norm_silu import group_norm_silu
from litevae_kernels.haar import haar_dwt2d, haar_idwt2d, haar_pyramid, wavedec2, waverec2
from litevae_kernels.smc import modulate_weight, self_modulated_conv2d

__all__ = [
    "accelerate_vae",
    "conv3x3",
    "group_norm_silu",
    "haar_dwt2d",
    "haar_idwt2d",
    "haar_pyramid",
    "modulate_weight",
    "restore_vae",
    "self_modulated_conv2d",
    "use_backend",
    "wavedec2",
    "waverec2",
]
