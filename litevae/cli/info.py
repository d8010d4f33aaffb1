"""`litevae info`."""

from typing import Annotated

import typer

from litevae.errors import UserError
from litevae.models.loading import find_model


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model or of a training run, or the name of a preset, with settings after it.",
        ),
    ],
    size: Annotated[
        int, typer.Option(min=16, max=65536, metavar="PIXELS", help="Side of the square image.")
    ] = 256,
) -> None:
    """Show a model's parameters, cost and latent shape.

    \b
    Example: litevae info litevae-b
             litevae info runs/demo --size 512
             litevae info litevae-b,latent_channels=12,aggregator=vit

    The presets (litevae-s, litevae-b, litevae-m, litevae-l) have 4 latent channels and Stable Diffusion's decoder;
    sd-vae is the whole VAE of Stable Diffusion. The settings are those of `model` in litevae train. A MAC is one
    multiplication and one addition.
    """
    from litevae.evaluation.complexity import measure_complexity

    autoencoder = find_model(model, size)
    try:
        cost = measure_complexity(autoencoder, size)
    except ValueError as error:
        raise UserError(f"--size {size}: {error}") from None

    print(f"{'':10}{'parameters':>14}{'GMACs':>12}")
    total = cost.encoder_parameters + cost.decoder_parameters, cost.encoder_macs + cost.decoder_macs
    for name, parameters, macs in (
        ("encoder", cost.encoder_parameters, cost.encoder_macs),
        ("decoder", cost.decoder_parameters, cost.decoder_macs),
        ("together", *total),
    ):
        print(f"{name:10}{parameters:14,}{macs / 1e9:12,.2f}")
    shape = " x ".join(map(str, cost.latent_shape))
    print(f"latent: {shape}, for an image of {autoencoder.config.in_channels} x {size} x {size}")
