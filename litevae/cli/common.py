"""What several commands need."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from litevae.errors import UserError

if TYPE_CHECKING:
    from litevae.models.baseline import Autoencoder


def load_model(path: Path) -> "Autoencoder":
    """The autoencoder in a folder that `save_pretrained` wrote, or in `model/` of a training run's folder.

    Raises:
        UserError: no such folder, neither a LiteVAE nor a baseline, or files that are missing or broken.
    """
    folder = path if (path / "config.json").exists() else path / "model"
    config = folder / "config.json"
    if not path.is_dir():
        raise UserError(f"{path}: {'is a file, not a model folder' if path.exists() else 'no such folder'}")
    if not config.is_file():
        raise UserError(f"{path}: not a model: there is no config.json in it")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"{config}: not a model's configuration") from None
    if kind not in ("LiteVAE", "AutoencoderKL", "SmallEncoderVAE"):
        raise UserError(f"{path}: not a LiteVAE but {kind or 'something else'}")

    from diffusers import AutoencoderKL
    from safetensors import SafetensorError

    from litevae.models import LiteVAE
    from litevae.models.baseline import SmallEncoderVAE

    classes = {each.__name__: each for each in (LiteVAE, AutoencoderKL, SmallEncoderVAE)}
    try:
        model, loading = classes[kind].from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded: {error}") from None
    if loading["missing_keys"]:
        raise UserError(f"{folder}: its weights lack {loading['missing_keys'][0]} and perhaps others")
    return model
