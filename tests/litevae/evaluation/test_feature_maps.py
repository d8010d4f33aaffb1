import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.evaluation.feature_maps import draw_feature_maps, feature_magnitude, imbalance, inside

SIZE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


def litevae(**settings):
    torch.manual_seed(0)
    return LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4, **settings
    ).eval()


def baseline():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=4, **blocks
    ).eval()


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (litevae, SIZE),
        (lambda: litevae(decoder_norm="smc", output_type="wavelet", use_1x1_conv=True), SIZE // 2),
        (baseline, SIZE),
    ],
    ids=["group", "smc-wavelet", "diffusers"],
)
def test_magnitude_is_the_root_mean_square_of_what_goes_into_the_output_layers(make, side):
    model, image = make().double(), data.chelsea()[100 : 100 + SIZE, 100 : 100 + SIZE]
    found = feature_magnitude(model, image)
    with torch.no_grad():
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).float() / 127.5 - 1
        z = model.encode(pixels.double()).latent_dist.mean
        if model.post_quant_conv is not None:
            z = model.post_quant_conv(z)
        features = model.decoder.mid_block(model.decoder.conv_in(z))
        for block in model.decoder.up_blocks:
            features = block(features)
        # Only the output layers follow the features.
        output = model.decoder.conv_norm_out(features)
        output = output if isinstance(model, LiteVAE) else torch.nn.functional.silu(output)
        torch.testing.assert_close(model.decoder.conv_out(output), model.decoder(z))
    assert found.shape == (side, side)
    # The same operations in float64.
    np.testing.assert_allclose(found, np.sqrt(np.mean(features.numpy()[0] ** 2, axis=0)), rtol=1e-10)
    assert not model.decoder.up_blocks[-1]._forward_hooks


def test_borders_are_left_out():
    marked = np.zeros((32, 17))
    marked[4:-4, 3:-3] = 1  # an eighth, rounded up
    assert (inside(marked) == 1).all()
    assert inside(marked).sum() == marked.sum()
    assert inside(np.zeros((16, 16, 3), np.uint8)).shape == (12, 12, 3)


def test_imbalance_of_known_maps():
    assert imbalance([np.full((8, 8), 3.0)]) == 1.0
    spot = np.ones((100, 100))
    spot[:5, :5] = 7.0  # 25 of 10,000 pixels; the percentile leaves out 10
    assert imbalance([spot]) == 7.0
    assert imbalance([1e-4 * spot, 1e4 * spot]) == pytest.approx(7.0)
    assert imbalance([spot, np.ones((8, 8))]) == 4.0
    few = np.ones((100, 100))
    few[0, :9] = 7.0
    assert imbalance([few]) == 1.0

    rng = np.random.default_rng(0)
    values = rng.gamma(1.0, size=(37, 53))
    ordered, place = np.sort(values.ravel()), 0.999 * (values.size - 1)
    below = int(place)
    high = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
    assert imbalance([values]) == pytest.approx(high / ordered[values.size // 2], rel=1e-12)


def test_what_has_no_imbalance():
    with pytest.raises(ValueError, match="at least one map"):
        imbalance([])
    with pytest.raises(ValueError, match="median must be above 0"):
        imbalance([np.eye(8)])
    model = litevae()
    with torch.no_grad():
        model.decoder.conv_in.bias[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        feature_magnitude(model, np.zeros((SIZE, SIZE, 3), np.uint8))


def test_picture_shows_each_model_on_its_own_scale(tmp_path):
    """A map is black where it is 0 and yellow where it is strongest, at every scale."""
    half = np.where(np.arange(8)[:, None] < 2, 0.0, 1.0) * np.ones((8, 8))
    for scale in (1.0, 1000.0):
        draw_feature_maps(
            [("cat", data.chelsea()[:64, :64])],
            {"a": [scale * half]},
            {"a": 1.0},
            tmp_path / f"{scale}.png",
        )
    one, other = (np.asarray(Image.open(tmp_path / f"{scale}.png").convert("RGB")) for scale in (1.0, 1000.0))
    np.testing.assert_array_equal(one, other)
    colours = {tuple(colour) for colour in one.reshape(-1, 3)}
    assert {(0, 0, 4), (252, 253, 191)} <= {
        (int(r), int(g), int(b)) for r, g, b in colours
    }  # the ends of magma
