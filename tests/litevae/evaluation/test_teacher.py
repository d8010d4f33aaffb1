import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.teacher import compare_latents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ).eval()


def test_errors_are_those_of_numpy(teacher, model_folder, square_images):
    model = LiteVAE.from_pretrained(model_folder)
    found = compare_latents(model, teacher, open_images(str(square_images)), 32, batch_size=2, workers=0)
    assert found.count == 5  # the broken file is left out
    pixels = np.stack([np.asarray(Image.open(square_images / f"{i}.png")) for i in range(5)])
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 127.5 - 1).float()
    with torch.no_grad():
        own, target = (each.encode(image).latent_dist for each in (model, teacher))
    error = (own.mean - target.mean).numpy()
    assert found.sigmas == pytest.approx(np.sqrt(np.mean((error / target.std.numpy()) ** 2)), rel=1e-4)
    assert found.relative == pytest.approx(np.sqrt(np.mean(error**2)) / target.mean.numpy().std(), rel=1e-4)
    difference = (own.logvar - target.logvar).numpy()
    assert found.logvar == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-4)


def test_a_model_agrees_with_itself(teacher, square_images):
    found = compare_latents(teacher, teacher, open_images(str(square_images)), 32, count=2, workers=0)
    assert (found.sigmas, found.relative, found.logvar) == (0, 0, 0)


def test_nothing_readable_says_why(teacher, broken_images):
    folder, message = broken_images
    with pytest.raises(UserError) as caught:
        compare_latents(teacher, teacher, open_images(str(folder)), 32, workers=0)
    assert str(caught.value) == message


def test_latents_of_another_shape_are_one_line(teacher, square_images):
    model = LiteVAE.from_preset("litevae-s", latent_channels=12)
    with pytest.raises(UserError) as caught:
        compare_latents(model, teacher, open_images(str(square_images)), 32, workers=0)
    assert str(caught.value) == (
        "the teacher's latent has 4 channels at 1/4 of the side, and the model's 12 channels at 1/8 of the side"
    )
