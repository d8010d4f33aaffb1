"""`litevae gradients`."""

from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import NamesOption, OverwriteOption, check_new_file, check_picture, name_each


def gradients(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="PNG file for the picture.")],
    names: NamesOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare the adversarial gradient with the reconstruction gradient over training, as in Figure 7.

    \b
    Example: litevae gradients runs/constant runs/adaptive -o gradients.png
    The runs must have been trained with gradient_ratio_every, for example:
             litevae train imagenet-b data.train=FOLDER gradient_ratio_every=100 output_dir=runs/constant
             litevae train imagenet-b data.train=FOLDER gradient_ratio_every=100 output_dir=runs/adaptive \\
                 loss.adversarial=0.5 loss.adversarial_weight=adaptive

    Reads the gradient_ratio that runs with gradient_ratio_every have logged: the norm of the gradient of the
    weighted adversarial loss divided by the norm of the gradient of the weighted reconstruction losses, with
    respect to all trained parameters of the autoencoder. The picture shows the ratio over the steps; the table
    shows its median and the spread of the middle 90% of the steps. Steps with a gradient that is 0 or not finite
    have no ratio.
    """
    check_picture(output)
    check_new_file(output, overwrite)
    paths = name_each(runs, names)

    from litevae.files import replacing
    from litevae.training.gradient_ratio import draw_gradient_ratios, read_gradient_ratios

    found = {name: read_gradient_ratios(path) for name, path in paths.items()}
    with replacing(output) as path:
        draw_gradient_ratios(found, path)

    width = max(len("run"), *(len(name) for name in found))
    print(f"{'run':{width}}{'steps':>8}{'median':>10}{'5 %':>10}{'95 %':>10}{'95 % / 5 %':>12}")
    for name, run in found.items():
        figures = "".join(f"{value:10.3g}" for value in (run.median, run.low, run.high))
        print(f"{name:{width}}{len(run.steps):8}{figures}{run.spread:12.3g}")
    print(f"see {output}")
