import socket
import sys

import pytest
import torch

from litevae.errors import UserError
from litevae.losses import STLPIPS, LossConfig, Objective, least_side, st_lpips


@pytest.fixture(scope="module")
def metric():
    return STLPIPS()


@pytest.mark.parametrize("shape", [(2, 3, 21, 21), (1, 3, 64, 75)])
def test_equals_the_package_on_images_of_8_bits(metric, st_lpips_package, shape):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in "ab"]
    a, b = (image / 127.5 - 1 for image in images)
    # The error of float32 is derived in test_perceptual.
    expected = st_lpips_package(a, b).mean()
    torch.testing.assert_close(metric(a, b), expected, rtol=2 * 16 * 4608**0.5 * 2**-24, atol=0)
    assert metric(a, a) == 0


def test_nothing_is_downloaded_printed_or_drawn(monkeypatch, capsys):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("connects"))
    before = torch.get_rng_state()
    STLPIPS()
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    with pytest.raises(UserError) as caught:
        Objective(LossConfig(st_lpips=1.0))
    assert str(caught.value) == (
        "loss.st_lpips: st_lpips needs the package stlpips-pytorch 0.0.2, which has its weights: "
        "pip install 'litevae[perceptual]'"
    )


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(st_lpips, "WEIGHTS", "weights/vST0.0/vgg_shift_tolerant.pth")
    with pytest.raises(
        UserError, match=r"vgg_shift_tolerant\.pth is not that of stlpips-pytorch 0\.0\.2: its SHA"
    ):
        STLPIPS()


def test_smallest_image(metric):
    side = least_side(LossConfig(st_lpips=1.0))
    assert metric(*torch.zeros(2, 1, 3, side, side)) == 0
    with pytest.raises(ValueError, match=r"at least 21 pixels a side, got \(1, 3, 64, 20\)"):
        metric(*torch.zeros(2, 1, 3, 64, side - 1))


def test_steps_on_the_loss_bring_the_images_together(metric, pair):
    image, reconstruction = (each.float() for each in pair((2, 3, 32, 32)))
    objective = Objective(LossConfig(l1=0, wavelet=0, gaussian=0, kl=0, st_lpips=1.0))
    reconstruction.requires_grad_()
    optimizer, values = torch.optim.Adam([reconstruction], 0.02), []
    for step in range(8):
        moments = [torch.zeros(2, 4, 4, 4)] * 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective.generator(image, reconstruction, *moments, step=step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        values.append(loss.terms["st_lpips"].item())
    assert values[1] < values[0]
    assert metric(image, reconstruction) < 0.8 * values[0]
