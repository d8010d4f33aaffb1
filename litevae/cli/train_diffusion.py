"""`litevae train-diffusion`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from litevae.cli.common import stopped_message
from litevae.models.loading import load_model


def train_diffusion(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="small, ldm-ffhq, ldm-celeba-hq, or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the configuration."),
    ] = None,
) -> None:
    """Train a diffusion model on an autoencoder's latents.

    \b
    Example: litevae train-diffusion small model=runs/demo data.latents=latents
             litevae train-diffusion small model=runs/demo data.train=FOLDER noise.kind=ddpm
             litevae train-diffusion ldm-ffhq model=runs/ffhq-b data.latents=latents fid.images=FOLDER
             litevae train-diffusion ldm-ffhq model=runs/ffhq-b data.latents=latents resume=auto
             torchrun --nproc-per-node 2 --no-python litevae train-diffusion ldm-ffhq ...

    litevae config CONFIG shows every setting of a configuration with its default, range and meaning.

    model is the folder of an autoencoder whose latents litevae scale has measured. data.latents is a folder that
    litevae encode has written with this autoencoder. data.train takes images instead, as in litevae train, which are
    encoded at each step. ldm-ffhq is the U-Net of LDM (Rombach et al., 2022) for FFHQ, with 274 M parameters and
    LDM's noise (ddpm) and optimizer. small has 7 M parameters and EDM's noise (Karras et al., 2022; noise.kind=edm).

    A run writes these files to its folder:

    \b
      pipeline/      a diffusers pipeline, for litevae.diffusion.LatentDiffusionPipeline.from_pretrained
      samples.png    sample.count images, drawn in sample.steps Euler (edm) or ancestral (ddpm) steps
      loss.png       the loss over the steps
      metrics.json   FID, or why it was not measured, and what was trained
      metrics.jsonl  one line per logged step
      config.yaml    every setting; litevae train-diffusion runs/NAME/config.yaml output_dir=DIR repeats the run
      checkpoints/   one every checkpoint.every steps; the last checkpoint.keep are kept

    FID compares fid.count samples with all images of fid.images (data.train by default), if Inception's weights are
    present. fid.measure=always downloads the weights, and the run does not begin without them. To measure the FID of
    a run that has ended, repeat its command with fid.measure=always resume=auto.

    resume=auto continues from the newest checkpoint, if there is one, with the same losses as if the run had not
    been interrupted. Ctrl-C (or SIGTERM) ends the run after the current step, saves all of these files except FID
    and exits with status 0; a second one quits at once. A step with a non-finite loss or gradient is skipped. After
    max_bad_steps such steps in a row, the run saves the state before the first of them and exits with status 1.
    """
    from litevae.diffusion import load_diffusion_config
    from litevae.diffusion import train as run

    settings = load_diffusion_config(config, overrides or ())
    result = run(settings, load_model(Path(settings.model)))
    if int(os.environ.get("RANK", "0")):  # only the first process prints
        return
    if result.stopped_by:
        print(stopped_message(result.stopped_by, result.steps, settings.checkpoint.every > 0))
    loss = "" if result.loss is None else f"; loss {result.loss:.4f}"
    print(
        f"{result.steps} steps of a U-Net of {result.parameters:,} parameters in {result.seconds:.0f} s{loss}"
    )
    if result.fid is None:
        print(f"FID was not measured: {result.no_fid}")
    else:
        print(f"FID of {settings.fid.count} samples and {result.fid.images} images: {result.fid.value:.2f}")
        if result.fid.unreadable:
            print(f"unreadable images left out: {result.fid.unreadable}")
    print(f"see {result.output_dir / 'samples.png'} and {result.output_dir / 'loss.png'}")
