"""The model of a training run, built from its settings."""

from pathlib import Path

from litevae.errors import UserError
from litevae.models.build import with_fresh_weights
from litevae.models.interface import Autoencoder
from litevae.models.loading import model_folder, report_weights
from litevae.models.weights import load_decoder, load_weights
from litevae.training.config import Config


def build_model(config: Config) -> Autoencoder:
    """Builds the model of a run, with fresh weights or those of `config.init` and `config.init_decoder`.

    Args:
        config: settings of the run.

    Raises:
        UserError: the model does not take a setting, or weights are missing, are damaged or belong to another
            architecture.
    """
    try:
        model = with_fresh_weights(config.model, config.data.size)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if config.init:
        folder = model_folder(Path(config.init))
        report_weights(Path(config.init), folder)
        load_weights(model, folder, "init")
    if config.init_decoder:
        load_decoder(model, Path(config.init_decoder))
    if config.freeze_encoder:
        for part in (model.encoder, model.quant_conv):
            if part is not None:
                part.requires_grad_(False)
    return model
