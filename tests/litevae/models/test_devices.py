"""A model gives the same results on a GPU as on the CPU."""

import copy

import pytest
import torch

from litevae import LiteVAE

CHANCE = 4  # times the CPU's own rounding error: devices add in different orders

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_encode_and_decode_equal_the_cpu_s(tiny_config, monkeypatch, device, dtype, format):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    vae = LiteVAE(**tiny_config).to(memory_format=format).eval()
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, 3, 40, 56) * 2 - 1
    exact_vae = copy.deepcopy(vae).double()
    exact = exact_vae.encode(images.double()).latent_dist
    exact_image = exact_vae.decode(exact.mean).sample

    def errors(device: str) -> list[float]:
        moved = copy.deepcopy(vae).to(device, dtype)
        posterior = moved.encode(images.to(device, dtype)).latent_dist
        decoded = moved.decode(exact.mean.to(device, dtype)).sample
        assert posterior.mean.device.type == decoded.device.type == device
        results = ((posterior.mean, exact.mean), (posterior.logvar, exact.logvar), (decoded, exact_image))
        return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in results]

    for error, cpu in zip(errors(device), errors("cpu"), strict=True):
        assert error <= CHANCE * cpu < 0.2
