import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data

from litevae import LiteVAE
from litevae.errors import one_line
from litevae.evaluation.pictures import draw_grid, draw_reconstructions, latents_as_rgb


class TestLatentsAsRGB:
    def test_shows_the_directions_of_most_variance(self):
        generator = torch.Generator().manual_seed(0)
        latent = 0.01 * torch.randn(6, 20, 30, generator=generator)
        latent[4] += torch.linspace(-3, 3, 30)
        (picture,) = latents_as_rgb([latent])
        assert (picture.shape, picture.dtype) == ((20, 30, 3), np.uint8)
        brightness = picture[..., 0].mean(axis=0)
        assert abs(np.corrcoef(brightness, np.arange(30))[0, 1]) > 0.99

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_takes_any_number_of_channels_and_sizes(self, channels):
        latents = [torch.randn(channels, *size) for size in ((4, 6), (5, 5), (1, 1))]
        assert [p.shape for p in latents_as_rgb(latents)] == [(4, 6, 3), (5, 5, 3), (1, 1, 3)]

    def test_constant_latent_is_a_picture_too(self):
        latents_as_rgb([torch.zeros(4, 3, 3)])


def test_grid_shows_each_image_beside_its_reconstruction(tmp_path):
    images = [data.chelsea()[:20, :30], data.chelsea()[50:60, 50:90]]
    pairs = [(image, 255 - image) for image in images]
    draw_grid(pairs, tmp_path / "validation" / "grid.png", most=2)
    grid = np.asarray(Image.open(tmp_path / "validation" / "grid.png"))
    assert grid.shape == (30, 80, 3)
    np.testing.assert_array_equal(grid[:20, :60], np.concatenate(pairs[0], axis=1))
    np.testing.assert_array_equal(grid[20:], np.concatenate(pairs[1], axis=1))
    assert (grid[:20, 60:] == 255).all()


def test_first_three_channels_are_red_green_and_blue():
    latent = torch.stack(
        [*torch.meshgrid(torch.arange(50.0), torch.arange(50.0), indexing="ij"), *torch.randn(2, 50, 50)]
    )
    (picture,) = latents_as_rgb([latent], principal=False)
    low, high = np.percentile(latent[:3].flatten(1).numpy(), (1, 99), axis=1)
    expected = np.clip((latent[:3].numpy() - low[:, None, None]) / (high - low)[:, None, None], 0, 1) * 255
    assert np.abs(picture.transpose(2, 0, 1) - expected).max() <= 0.51
    assert latents_as_rgb([latent[:2]], principal=False)[0].shape == (50, 50, 3)


@pytest.mark.parametrize("width", [64, 128, 448])
def test_long_labels_do_not_run_into_each_other(tmp_path, monkeypatch, width):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    model = LiteVAE.from_preset(
        "litevae-s", encoder_type="dwt", latent_channels=12, block_out_channels=[16] * 4, num_groups=4
    )
    long = ["/a/folder/whose/path/is/long" * 5 + "/0000000-0000.png", "M" * 30]
    image = data.chelsea()[:64, :width]
    draw_reconstructions(model, [(name, image) for name in ("1", *long)], tmp_path / "picture.png")
    labelled = [axes for axes in figures[0].axes if axes.get_ylabel()]
    labels = [axes.get_ylabel() for axes in labelled]
    assert labels[0] == "1"
    for axes, shown, label in zip(labelled[1:], labels[1:], long, strict=True):
        assert shown.endswith(label[-1])
        assert "..." in shown
        height, room = axes.yaxis.label.get_window_extent().height, axes.get_window_extent().height
        assert height <= room
        if len(shown) > 4:  # there is no room for one letter more
            axes.set_ylabel(one_line(label, len(shown) + 1))
            assert axes.yaxis.label.get_window_extent().height > room
