"""`litevae train`."""

import os
from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A shipped configuration (demo), or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the configuration's."),
    ] = None,
) -> None:
    """Train an autoencoder.

    \b
    Example: litevae train demo
             litevae train demo max_steps=200 output_dir=runs/short loss.wavelet=0

    The demo trains a LiteVAE-S with a small decoder on scikit-image's photographs, in about 4 minutes on 2
    CPU cores and without any download, and holds out chelsea the cat to measure on. It leaves in runs/demo:

    \b
      reconstructions.png  input, reconstruction and latent of some photographs
      curves.png           the losses, and PSNR and SSIM of the held-out photograph
      metrics.json         the same PSNR and SSIM as numbers
      metrics.jsonl        a line for each logged step
      config.yaml          every setting: litevae train runs/demo/config.yaml repeats the run
      model/               for litevae reconstruct, or LiteVAE.from_pretrained

    Ctrl-C (or SIGTERM) ends the run after the current step, saves all of this and exits with status 0; a
    second one quits at once. A loss that is no longer finite saves what the step before left and exits
    with status 1.
    """
    from litevae.training import load_config
    from litevae.training import train as run

    result = run(load_config(config, overrides or ()))
    if int(os.environ.get("RANK", "0")):  # the first process speaks for all
        return
    if result.stopped_by:
        print(f"stopped by {result.stopped_by} after {result.steps} steps; everything is saved")
    measured = (
        "" if result.psnr is None else f"; validation: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.3f}"
    )
    print(f"{result.steps} steps in {result.seconds:.0f} s{measured}")
    print(f"see {result.output_dir / 'reconstructions.png'} and {result.output_dir / 'curves.png'}")
