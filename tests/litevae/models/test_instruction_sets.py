"""Compares the models' convolutions under each instruction set of the CPU with PyTorch's direct convolution."""

import copy

import pytest
import skimage.data
import torch

from litevae import LiteVAE
from litevae.data.pixels import to_model_range
from litevae_kernels import use_backend
from litevae_kernels.arithmetic import multiplies


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
def test_half_precision_on_a_cpu_without_it(vae, photograph, isa, dtype):
    """The kernels round where the widened reference rounds, so the errors agree but for chance."""
    if multiplies(dtype, isa):
        pytest.skip("this CPU multiplies the dtype")
    direct = vae.encode(photograph).latent_dist.parameters
    half = copy.deepcopy(vae).to(dtype=dtype)
    moments = half.encode(photograph.to(dtype)).latent_dist.parameters
    assert moments.dtype == dtype
    with use_backend("reference"):
        rounded = half.encode(photograph.to(dtype)).latent_dist.parameters
    error, error_of_reference = ((m.float() - direct).norm() for m in (moments, rounded))
    assert 0 < error <= 1.5 * error_of_reference
