"""`litevae distill`."""

from typing import Annotated

import typer

from litevae.cli.train import run_training
from litevae.errors import UserError


def distill(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="Folder of a diffusers AutoencoderKL, of a pipeline with one, or of a training run.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the configuration distill."),
    ] = None,
) -> None:
    """Train a LiteVAE encoder for the latents of another autoencoder.

    \b
    Example: litevae distill path/to/sd-vae data.train=path/to/images
             litevae distill path/to/flux data.train=path/to/images model.preset=litevae-s
             litevae distill path/to/sd-vae data.train=path/to/images loss.l1=1 loss.lpips=1
             litevae distill path/to/sd-vae data.train=path/to/images resume=auto
             litevae distill path/to/sd-vae data.train=path/to/images data.crop=middle teacher_latents=latents
             litevae eval runs/distill path/to/images --teacher path/to/sd-vae

    The encoder learns to produce the posterior that the teacher's encoder gives for the same crop. The decoder is the
    teacher's and stays unchanged, and so does the scale of the latents, so the model takes the place of the VAE in the
    teacher's pipelines. Its card, README.md, names the teacher and the SHA-256 of its weights.

    This is litevae train with the configuration distill, and with the settings of the latent, the decoder and the
    images taken from the teacher: litevae config distill shows all settings, and litevae train --help the files of
    a run.
    loss.teacher_kl weighs the KL divergence between the two posteriors, loss.teacher_mean and loss.teacher_logvar
    the distances of their means and log-variances; every other term of loss may be added.

    The teacher encodes each crop, unless teacher_latents is a folder that litevae encode has written with the teacher,
    from the same images and in the same size. The crops are then the middle squares, data.crop=middle, and data.flip
    needs latents that were encoded with --mirror.
    """
    from litevae.training.teacher import as_overrides, image_settings, load_teacher, teacher_settings

    given = overrides or []
    if any(override.startswith("teacher=") for override in given):
        raise UserError(f"teacher is the argument TEACHER, {teacher}: leave out teacher=")
    model = load_teacher(teacher)
    settings = as_overrides(teacher_settings(model)) + as_overrides(image_settings(model), "data")
    run_training("distill", [f"teacher={teacher}", *settings, *given])
