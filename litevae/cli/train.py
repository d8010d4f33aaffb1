"""`litevae train`."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from litevae.cli.common import COLUMNS, stopped_message


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A shipped configuration, such as demo, or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the configuration."),
    ] = None,
) -> None:
    """Train an autoencoder.

    \b
    Example: litevae train demo
             litevae train demo max_steps=200 output_dir=runs/short loss.wavelet=0
             litevae train imagenet-b data.train=FOLDER data.validation=FOLDER
             litevae train imagenet-b data.train=FOLDER resume=auto
             torchrun --nproc-per-node 2 --no-python litevae train imagenet-b data.train=FOLDER

    litevae config lists the shipped configurations, and litevae config CONFIG shows every setting of one with its
    default, range and meaning.

    The demo trains a LiteVAE-S with a small decoder on scikit-image's photographs. It takes about 4 minutes on 2
    CPU cores, downloads nothing, and holds out one photograph, chelsea the cat, for validation. The other
    configurations are the paper's: imagenet-b (256 x 256), imagenet-128-b, imagenet-b-tuned (128, then 256), ffhq-b,
    and the baselines imagenet-sd-vae and imagenet-vae-small. sd-vae-decoder fine-tunes the decoder of Stable
    Diffusion's own VAE, init=SD_VAE. The paper's other models are settings of these:
    model.preset=litevae-s, -m or -l, and model.latent_channels=12 with loss.kl=6.25e-8. The encoders of its
    ablations are model.encoder_type, extractor, shared_extractor, aggregator, finest_level and encoder_norm.
    data.train is a folder of images, WebDataset shards, a Hugging Face dataset on disk, .parquet files, or demo.

    A run writes these files to its folder:

    \b
      reconstructions.png  input, Haar yardstick, reconstruction and latent of some images
      validation/          the validation images beside their reconstructions, for each measurement
      curves.png           the losses, and PSNR and SSIM of the validation images
      metrics.json         the same PSNR and SSIM as numbers, beside those of the yardsticks
      metrics.jsonl        one line per logged step: loss is the minimised sum of the weighted/NAME,
                           NAME is that term without its weight, and discriminator is its own loss
      config.yaml          every setting; litevae train runs/demo/config.yaml output_dir=runs/again
                           repeats the run
      model/               the model and its card, for litevae reconstruct, push or LiteVAE.from_pretrained
      checkpoints/         one every checkpoint.every steps and one at each new best validation, by
                           checkpoint.best_by; the last checkpoint.keep and the best are kept
                           (the demo writes none)
      tensorboard/         unless tracker is wandb or none

    A finished model is never replaced: without checkpoints to continue from, give another output_dir, or delete it.
    resume=auto continues from the newest checkpoint, if there is one, and skips checkpoints that are damaged
    according to their SHA-256. resume=PATH continues from a checkpoint of another run. init=PATH starts from the
    weights of a model, init_decoder=PATH from the decoder of a diffusers AutoencoderKL, and freeze_encoder=true
    trains only the decoder.

    Ctrl-C (or SIGTERM) ends the run after the current step, saves all of these files and exits with status 0; a
    second one quits at once. A step with a non-finite loss or gradient is skipped. After max_bad_steps such steps in
    a row, the run saves the state before the first of them and exits with status 1. If more than
    data.max_bad_fraction of the images are unusable, the run also saves its state, and exits with status 2. It does
    so with status 1 if a process that reads images is killed.
    """
    run_training(config, overrides or ())


def run_training(config: str, overrides: Sequence[str]) -> None:
    """Trains an autoencoder with the settings of `load_config`, and prints its results."""
    from litevae.evaluation.yardsticks import BELOW, HAAR, below_haar
    from litevae.training import load_config
    from litevae.training import train as run

    settings = load_config(config, overrides)
    result = run(settings)
    if int(os.environ.get("RANK", "0")):  # only the first process prints
        return
    if result.stopped_by:
        print(stopped_message(result.stopped_by, result.steps, settings.checkpoint.every > 0))
    measured = ""
    others = "".join(
        f", {heading} {result.metrics[name]:.{digits}f}"
        for name, (heading, digits) in COLUMNS.items()
        if name in result.metrics and name not in ("psnr", "ssim")
    )
    if result.psnr is not None:
        haar = result.yardsticks[HAAR]
        below = below_haar({"psnr": result.psnr}, result.yardsticks)
        measured = (
            f"; validation: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.3f}{others}{f' ({BELOW})' * below}; "
            f"Haar yardstick: {haar['psnr']:.2f} dB, {haar['ssim']:.3f}"
        )
    print(f"{result.steps} step{'s' * (result.steps != 1)} in {result.seconds:.0f} s{measured}")
    print(f"see {result.output_dir / 'reconstructions.png'} and {result.output_dir / 'curves.png'}")
