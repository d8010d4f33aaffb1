import numpy as np
import torch
from PIL import Image

from litevae.diffusion.pictures import draw_loss, draw_samples


def test_grid_has_the_images_in_their_order(tmp_path):
    samples = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 4) * 50
    draw_samples(samples, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (8, 18, 3)  # a gap of 2 pixels to the right of each image and below it
    assert grid[0, ::6, 0].tolist() == [0, 50, 100]
    assert grid[4, ::6, 0].tolist() == [150, 200, 255]
    assert (grid[:, 4:6] == 255).all()
    assert (grid[2:4] == 255).all()


def test_loss_is_drawn_from_the_lines_that_have_one(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "skipped": "the loss is nan"}, {"step": 3, "loss": 1.0}]
    draw_loss(lines, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (720, 480)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
