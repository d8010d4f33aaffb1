"""The plot of losses and validation metrics."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from litevae.training.curves import draw_curves

HISTORY = [{"step": 2, "psnr": 20.0, "ssim": 0.5}, {"step": 4, "psnr": 22.0, "ssim": 0.6}]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that draws curves and returns the axes: losses, and, with a history, PSNR and SSIM."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *arguments: (figures.append(self), save(self, *arguments))
    )

    def draw(lines, terms, history=HISTORY, **yardstick):
        draw_curves(lines, terms, history, yardstick, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size == (1200 if history else 600, 480)
        return figures.pop().axes

    return draw


def curves(axes):
    """Returns the steps of each smoothed curve, by its name in the legend."""
    return {
        line.get_label(): line.get_xdata().tolist()
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_a_term_is_drawn_at_the_steps_that_have_it(draw):
    lines = [
        {"step": 1, "loss": 2.0, "l1": 1.0},
        {"step": 2, "skipped": "the l1 loss is nan"},
        {"step": 3, "loss": 1.5, "l1": 0.5, "adversarial": 0.3},
    ]
    losses, _, _ = draw(lines, ["l1", "adversarial"])
    assert curves(losses) == {"total": [1, 3], "l1": [1, 3], "adversarial": [3]}
    assert losses.get_yscale() == "log"


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_a_logarithmic_scale_gives_way_to_values_that_it_cannot_show(draw, value):
    losses, _, _ = draw(
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "adversarial": value}], ["adversarial"]
    )
    assert losses.get_yscale() == "symlog"


def test_validation_metrics_have_an_axis_each(draw):
    _, psnr, ssim = draw([{"step": 1, "loss": 1.0}], [])
    for axes, values in ((psnr, [20.0, 22.0]), (ssim, [0.5, 0.6])):
        (line,) = axes.lines
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 4], values)


def test_the_haar_yardstick_is_a_dashed_line_in_each(draw):
    _, psnr, ssim = draw([{"step": 1, "loss": 1.0}], [], psnr=28.5, ssim=0.7)
    for axes, value in ((psnr, 28.5), (ssim, 0.7)):
        (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert set(line.get_ydata()) == {value}
    _, psnr, _ = draw([{"step": 1, "loss": 1.0}], [], psnr=float("inf"), ssim=1.0)
    assert len(psnr.lines) == 1


def test_a_run_without_steps_or_validation_has_one_empty_plot(draw):
    (losses,) = draw([], ["l1"], history=[])
    assert curves(losses) == {"total": [], "l1": []}
