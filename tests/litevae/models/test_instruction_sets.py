"""Compares the models' convolutions under each instruction set of the CPU with PyTorch's direct convolution."""

import pytest
import skimage.data
import torch

from litevae import LiteVAE
from litevae.data.images import to_model_range
from litevae_kernels import use_backend
from litevae_kernels.backend import core

NAMES = ("baseline", "avx2", "avx512", "avx512bf16")


@pytest.fixture(params=NAMES[: NAMES.index(core.isa()) + 1])
def isa(request):
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


@pytest.fixture(scope="module", params=["litevae-s", "litevae-b"])
def vae(request):
    torch.manual_seed(0)
    vae = LiteVAE.from_preset(request.param, latent_channels=4, block_out_channels=(32, 32, 32, 32))
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photograph():
    image = to_model_range(torch.from_numpy(skimage.data.astronaut().copy())).permute(2, 0, 1)
    return image[None, :, :96, 200:264]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_the_direct_convolution(vae, photograph, isa, memory_format):
    vae, image = vae.to(memory_format=memory_format), photograph.contiguous(memory_format=memory_format)
    moments = vae.encode(image).latent_dist.parameters
    with use_backend("reference"):
        direct = vae.encode(image).latent_dist.parameters
    assert not torch.equal(moments, direct)
    assert (moments - direct).norm() <= 2e-5 * direct.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_float32_as_its_roundings(vae, photograph, isa, dtype):
    """On a CPU without the arithmetic, only what is stored between layers is rounded."""
    direct = vae.encode(photograph).latent_dist.parameters
    half = LiteVAE.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    half = half.to(dtype=dtype).eval().requires_grad_(False)
    moments = half.encode(photograph.to(dtype)).latent_dist.parameters
    assert moments.dtype == dtype
    assert (moments.float() - direct).norm() <= 4 * torch.finfo(dtype).eps * direct.norm()
