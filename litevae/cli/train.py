"""`litevae train`."""

import os
from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A shipped configuration, such as demo, or a .yaml file.")
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
             litevae train imagenet-b data.train=FOLDER data.validation=FOLDER
             litevae train imagenet-b data.train=FOLDER resume=auto
             torchrun --nproc-per-node 2 --no-python litevae train imagenet-b data.train=FOLDER

    The demo trains a LiteVAE-S with a small decoder on scikit-image's photographs, in about 4 minutes on 2
    CPU cores and without any download, and holds out chelsea the cat to measure on. The other shipped
    configurations are the paper's: imagenet-b (256 x 256), imagenet-128-b, imagenet-b-tuned (128, then 256),
    ffhq-b, and the baselines imagenet-sd-vae and imagenet-vae-small. model.preset=litevae-s, -m or -l and
    model.latent_channels=12 make its other models of them; the encoders of its ablations are model.encoder_type,
    extractor, shared_extractor, aggregator, finest_level and encoder_norm. data.train is a folder of images, WebDataset
    shards, a Hugging Face dataset on disk, .parquet files, or demo.

    A run's folder holds:

    \b
      reconstructions.png  input, reconstruction and latent of some images
      validation/          the validation images beside their reconstructions, for each measurement
      curves.png           the losses, and PSNR and SSIM of the validation images
      metrics.json         the same PSNR and SSIM as numbers
      metrics.jsonl        a line for each logged step: loss is what is minimised, the sum of the
                           weighted/NAME; NAME is that term without its weight; discriminator its own loss
      config.yaml          every setting: litevae train runs/demo/config.yaml repeats the run
      model/               for litevae reconstruct, or LiteVAE.from_pretrained
      checkpoints/         one every checkpoint.every steps and at each new best PSNR, of which the last
                           checkpoint.keep and the best stay (not the demo's)
      tensorboard/         unless tracker is wandb or none

    resume=auto goes on from the newest checkpoint, if there is one, and passes over those that are damaged by
    their SHA-256; resume=PATH from another run's. init=PATH starts from a model's weights, init_decoder=PATH
    from a diffusers AutoencoderKL's decoder, and freeze_encoder=true trains the decoder alone.

    Ctrl-C (or SIGTERM) ends the run after the current step, saves all of this and exits with status 0; a
    second one quits at once. A step whose loss or gradient is not finite is skipped; after max_bad_steps in a
    row the run saves what was before the first of them and exits with status 1. So it does, with status 2, when
    more than data.max_bad_fraction of the images cannot be used.
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
