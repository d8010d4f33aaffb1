import numpy as np
import pytest
import torch
from skimage import data

from litevae import LiteVAE
from litevae.evaluation.reconstruction import encode, reconstruct


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LiteVAE.from_preset("litevae-s", block_out_channels=(32, 32, 32, 32), layers_per_block=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (31, 45), (64, 32)])
def test_any_size_comes_back(model, size):
    image = data.chelsea()[: size[0], : size[1]]
    result = reconstruct(model, image)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    assert encode(model, image).shape == (1, 4, *(max(2, -(-side // 8)) for side in size))


def test_is_the_models_own_forward(model):
    image = data.chelsea()[:64, :32]
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = ((model(batch).sample[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(reconstruct(model, image) - expected).max() <= 0.501
