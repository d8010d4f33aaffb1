"""`examples/haar_denoiser.py` in a short form."""

import pytest
import torch
from PIL import Image


def test_trains_and_denoises(load_example, tmp_path, capsys):
    load_example("haar_denoiser").main(["--steps", "3", "--output", str(tmp_path)])
    assert Image.open(tmp_path / "denoised.png").size == (3 * 451, 300)
    assert "PSNR of the held-out photograph: noisy 20." in capsys.readouterr().out


@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_keeps_the_size(load_example, size):
    model = load_example("haar_denoiser").HaarDenoiser((16, 24))
    image = torch.randn(2, 3, *size)
    assert model(image).shape == image.shape
    model(image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
