"""Draws the pictures of architecture.md: `python docs/draw_architecture.py` writes encoder.png and training-step.png.

The shapes and widths come from the model itself, so the picture cannot disagree with the code.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from skimage import data, transform
from torch import Tensor, nn

from litevae import LiteVAE
from litevae_kernels import haar_pyramid

DOCS = Path(__file__).parent
SIZE = 256
DPI = 150
INK, SOFT = "#22303c", "#6b7a86"
FILLS = {
    "data": "#eef2f5",
    "kernel": "#d9ead7",
    "network": "#d6e4f5",
    "loss": "#fbe7c6",
    "update": "#f3d6d6",
}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width x height inches whose coordinates are inches."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, kind: str, title: str, detail: str = ""
) -> None:
    """A rounded box centred on (x, y), with a title and smaller lines below it."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=FILLS[kind],
            edgecolor=INK,
            linewidth=0.8,
        )
    )
    lines = detail.count("\n") + 1 if detail else 0
    titles = title.count("\n") + 1
    total = 0.19 * titles + 0.155 * lines
    axes.text(
        x,
        y + total / 2,
        title,
        ha="center",
        va="top",
        fontsize=9.5,
        color=INK,
        weight="bold",
        linespacing=1.15,
    )
    if detail:
        axes.text(
            x,
            y + total / 2 - 0.19 * titles,
            detail,
            ha="center",
            va="top",
            fontsize=7.8,
            color=INK,
            linespacing=1.25,
        )


def arrow(axes: Axes, *points: tuple[float, float], style: str = "-", label: str = "") -> None:
    """A line through the points with a head at its end; the label stands above its first part."""
    for start, end in itertools.pairwise(points[:-1]):
        axes.plot(
            *zip(start, end, strict=True), color=INK, linewidth=1.1, linestyle=style, solid_capstyle="round"
        )
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={
            "arrowstyle": "-|>,head_width=0.16,head_length=0.32",
            "color": INK,
            "linewidth": 1.1,
            "linestyle": style,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )
    if label:
        (x0, y0), (x1, _) = points[:2]
        axes.text((x0 + x1) / 2, y0 + 0.06, label, ha="center", va="bottom", fontsize=7.8, color=SOFT)


def picture(axes: Axes, image: np.ndarray, x: float, y: float, side: float) -> None:
    """An image of values in [0, 1], centred on (x, y)."""
    half = side / 2
    axes.imshow(
        np.clip(image, 0, 1), extent=(x - half, x + half, y - half, y + half), zorder=3, aspect="auto"
    )
    axes.plot(
        [x - half, x + half, x + half, x - half, x - half],
        [y - half, y - half, y + half, y + half, y - half],
        color=INK,
        linewidth=0.8,
        zorder=4,
    )


def shape_of(x: Tensor) -> str:
    """The shape without the batch."""
    return " x ".join(map(str, x.shape[1:]))


def mosaic(level: Tensor) -> np.ndarray:
    """A level's sub-bands as one picture: LL and V above, H and D below; details are amplified."""
    ll, h, v, d = level[0].split(3)
    details = [0.5 + 3 * band for band in (v, h, d)]
    top = torch.cat([ll * 0.5 + 0.5, details[0]], dim=2)
    bottom = torch.cat([details[1], details[2]], dim=2)
    return torch.cat([top, bottom], dim=1).permute(1, 2, 0).numpy()


def record_shapes(model: LiteVAE, image: Tensor) -> dict[str, str]:
    """The shape of what each part of the encoder returns, by the part's name."""
    shapes: dict[str, str] = {}

    def remember(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            shapes[name] = shape_of(output)

        model.encoder.get_submodule(name).register_forward_hook(hook)

    for name, _ in model.encoder.named_children():
        module = model.encoder.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            for index in range(len(module)):
                remember(f"{name}.{index}")
        else:
            remember(name)
    with torch.inference_mode():
        posterior = model.encode(image).latent_dist
    shapes["moments"] = shape_of(posterior.parameters)
    shapes["latent"] = shape_of(posterior.mean)
    return shapes


def draw_encoder(path: Path) -> None:
    """Draws the way from the image to the latent, with LiteVAE-B's shapes, and the parts of a U-Net."""
    photograph = data.chelsea()
    square = transform.resize(photograph[:, 75:375], (SIZE, SIZE), anti_aliasing=True).astype(np.float32)
    image = torch.from_numpy(square).permute(2, 0, 1)[None] * 2 - 1
    torch.manual_seed(0)
    model = LiteVAE.from_preset("litevae-b").eval()
    shapes = record_shapes(model, image)
    pyramid = haar_pyramid(image, 3)
    bands = pyramid[0].shape[1]

    figure, axes = canvas(13.2, 8.2)
    heights = (6.75, 4.95, 3.15)
    middle = heights[1]

    picture(axes, square, 0.95, middle, 1.5)
    axes.text(0.95, middle + 0.85, "image", ha="center", fontsize=9.5, weight="bold", color=INK)
    axes.text(0.95, middle - 0.95, shape_of(image), ha="center", fontsize=8.2, color=INK)

    box(axes, 2.75, middle, 1.25, 0.8, "kernel", "haar_pyramid", "3 levels, one pass")
    arrow(axes, (1.7, middle), (2.12, middle))
    for index, (y, level) in enumerate(zip(heights, pyramid, strict=True)):
        if y == middle:
            arrow(axes, (3.38, y), (3.98, y))
        else:
            arrow(axes, (2.75, middle + (0.4 if y > middle else -0.4)), (2.75, y), (3.98, y))
        picture(axes, mosaic(level), 4.6, y, 1.2)
        axes.text(4.6, y + 0.67, f"level {index + 1}", ha="center", fontsize=9.5, weight="bold", color=INK)
        axes.text(4.6, y - 0.78, shape_of(level), ha="center", fontsize=8.2, color=INK)
        arrow(axes, (5.22, y), (5.72, y))
        box(axes, 6.45, y, 1.45, 0.75, "network", "feature U-Net", shapes[f"feature_extractors.{index}"])
        name = f"downsamplers.{index}"
        if name in shapes:
            factor = level.shape[2] // int(shapes[name].split(" x ")[1])
            arrow(axes, (7.18, y), (7.68, y))
            box(axes, 8.4, y, 1.42, 0.75, "network", f"mean {factor} x {factor},\n3x3 conv", shapes[name])
            to_join = [(9.4, y)] if y == middle else [(9.62, y), (9.62, middle + 0.32)]
            arrow(axes, (9.12, y), *to_join)
        else:
            arrow(axes, (7.18, y), (9.62, y), (9.62, middle - 0.32))
    joined = len(pyramid) * bands
    side = pyramid[-1].shape[2]
    box(axes, 9.62, middle, 0.42, 0.64, "data", "cat")
    arrow(axes, (9.84, middle), (10.76, middle), label=f"{joined} x {side} x {side}")
    box(axes, 11.5, middle, 1.48, 0.75, "network", "aggregation\nU-Net", shapes["feature_aggregator"])
    arrow(axes, (11.5, middle - 0.38), (11.5, 3.62))
    box(
        axes,
        11.5,
        3.15,
        1.9,
        0.92,
        "data",
        "mean, log-variance",
        f"each {shapes['latent']}\nz = mean + std * noise",
    )
    arrow(axes, (12.46, 3.15), (13.05, 3.15))
    axes.text(12.76, 3.22, "decoder", ha="center", fontsize=8.2, color=SOFT)
    axes.text(
        0.2, 7.85, "LiteVAE-B's encoder, for one image of 256 x 256 pixels and 4 latent channels", fontsize=11.5,
        weight="bold", color=INK,
    )  # fmt: skip
    axes.text(
        3.98, 2.12, "Sub-bands: LL and V above, H and D below (details amplified)", fontsize=8.2, color=SOFT
    )

    draw_unet(axes, model, bottom=0.42)
    figure.savefig(path)


def draw_unet(axes: Axes, model: LiteVAE, bottom: float) -> None:
    """The widths of a U-Net's layers as bars, and its skip connections."""
    unet = model.encoder.feature_extractors[0]
    down = [block.conv1.out_channels for block in unet.encoder_blocks]
    mid = [block.conv1.out_channels for block in unet.mid_block.resnets]
    up = [block.conv1.out_channels for block in unet.decoder_blocks]
    layers = [
        ("conv", unet.conv_in.out_channels),
        *(("Res", width) for width in (*down, *mid, *up)),
        ("conv", unet.conv_out.out_channels),
    ]
    left, step = 2.95, 0.56
    scale = 0.75 / max(width for _, width in layers)
    axes.text(
        0.2,
        bottom + 0.95,
        "A U-Net\nThe numbers are channels;\nall layers keep the image's size.\nLines: skip connections, read\n"
        "beside the input without a copy",
        va="top",
        fontsize=8.2,
        color=INK,
        linespacing=1.35,
    )
    for index, (name, width) in enumerate(layers):
        x = left + step * index
        height = max(width * scale, 0.12)
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.17, bottom),
                0.34,
                height,
                boxstyle="round,pad=0,rounding_size=0.03",
                facecolor=FILLS["data" if name == "conv" else "network"],
                edgecolor=INK,
                linewidth=0.7,
            )
        )
        axes.text(x, bottom - 0.06, name, ha="center", va="top", fontsize=7.8, color=INK)
        axes.text(x, bottom + height + 0.03, str(width), ha="center", va="bottom", fontsize=7.8, color=INK)
    first_up = 1 + len(down) + len(mid)
    for index in range(len(down)):
        start, end = left + step * (len(down) - index), left + step * (first_up + index)
        level = bottom + 0.98 + 0.1 * index
        low = bottom + max(down[len(down) - 1 - index] * scale, 0.12) + 0.17
        axes.plot([start, start, end, end], [low, level, level, low], color=SOFT, linewidth=0.8)


def draw_training_step(path: Path) -> None:
    """Draws the way of a batch through one step, with the files that do the work."""
    figure, axes = canvas(13.2, 8.4)
    axes.text(0.2, 8.05, "One training step", fontsize=11.5, weight="bold", color=INK)
    axes.text(
        2.15, 8.06, "B crops of 256 x 256 pixels on this process, 4 latent channels", fontsize=9.5, color=SOFT
    )

    top, second, third, last = 6.95, 4.85, 2.95, 1.0
    box(axes, 1.25, top, 2.0, 1.1, "data", "crops", "worker processes read,\ncrop and mirror\ndata/crops.py")
    arrow(axes, (2.25, top), (3.3, top), label="uint8")
    box(axes, 4.2, top, 1.8, 1.1, "data", "image", "B x 3 x 256 x 256\nin [-1, 1]")
    arrow(axes, (5.1, top), (5.8, top))
    box(axes, 6.6, top, 1.6, 1.1, "network", "encoder", "models/encoder.py")
    arrow(axes, (7.4, top), (7.95, top))
    box(axes, 9.0, top, 2.1, 1.1, "data", "mean, log-variance", "B x 4 x 32 x 32\nz = mean + std * noise")
    arrow(axes, (10.05, top), (10.6, top))
    box(axes, 11.4, top, 1.6, 1.1, "network", "decoder", "models/decoder.py")

    box(axes, 11.4, second, 1.9, 0.9, "data", "reconstruction", "B x 3 x 256 x 256")
    arrow(axes, (11.4, top - 0.55), (11.4, second + 0.45))

    box(
        axes, 6.6, second, 4.2, 1.3, "loss", "objective",
        "l1, l2, lpips, esrgan, wavelet, gaussian, ldl, kl\nadversarial: discriminator(reconstruction), frozen\n"
        "each a mean per element, times its weight, in float32\nlosses/objective.py",
    )  # fmt: skip
    arrow(axes, (10.45, second), (8.7, second))
    arrow(axes, (9.0, top - 0.55), (9.0, 5.85), (7.6, 5.85), (7.6, second + 0.65))
    arrow(axes, (4.2, top - 0.55), (4.2, 5.85), (5.6, 5.85), (5.6, second + 0.65))

    box(
        axes, 11.4, third, 2.6, 1.3, "loss", "discriminator's loss",
        "image and reconstruction, detached;\nhinge or logistic, means per head\nfrom step adversarial_start on\n"
        "discriminators/",
    )  # fmt: skip
    arrow(axes, (11.4, second - 0.45), (11.4, third + 0.65))
    arrow(
        axes,
        (3.3, top - 0.3),
        (2.9, top - 0.3),
        (2.9, 3.85),
        (9.75, 3.85),
        (9.75, third + 0.25),
        (10.1, third + 0.25),
    )

    box(
        axes,
        6.6,
        third,
        2.6,
        0.9,
        "update",
        "gradients of both networks",
        "from the same weights\nclipped to max_gradient_norm",
    )
    arrow(axes, (6.6, second - 0.65), (6.6, third + 0.45))
    axes.text(6.7, 4.0, "backward", fontsize=7.8, color=SOFT, va="bottom")
    arrow(axes, (10.1, third - 0.15), (7.9, third - 0.15))
    axes.text(9.0, third - 0.11, "backward", fontsize=7.8, color=SOFT, ha="center", va="bottom")

    box(
        axes, 6.6, last, 2.6, 1.2, "update", "one decision for all",
        "losses and gradient norms,\naveraged over the processes:\nare all finite?\ntraining/step.py",
    )  # fmt: skip
    arrow(axes, (6.6, third - 0.45), (6.6, last + 0.6))
    box(
        axes, 11.0, last, 3.2, 1.2, "update", "update",
        "AdamW of autoencoder and discriminator,\nthen the averaged model\ntraining/optimization.py",
    )  # fmt: skip
    arrow(axes, (7.9, last), (9.4, last), label="yes")
    box(
        axes, 2.1, last, 3.4, 1.2, "update", "skip the step",
        "no weight changes; statistics are put back;\nmax_bad_steps in a row end the run\ntraining/loop.py",
    )  # fmt: skip
    arrow(axes, (5.3, last), (3.8, last), label="no")
    figure.savefig(path)


if __name__ == "__main__":
    draw_encoder(DOCS / "encoder.png")
    draw_training_step(DOCS / "training-step.png")
