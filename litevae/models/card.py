"""Model cards: the README.md beside a model, which says what the model is, how it was made and how to load it.

Hugging Face's Hub shows it on the page of a repository, and reads the licence and the metrics from its header.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from litevae.models.presets import PRESETS

if TYPE_CHECKING:
    from litevae.models.interface import Autoencoder

README = "README.md"
PATH = "PATH"  # stands in a card's example for the folder or the repository of the model
UNKNOWN_LICENSE = "unknown"  # one of the Hub's identifiers
HEADINGS = {
    "psnr": "PSNR (dB)",
    "rfid": "rFID",
    "st_lpips": "ST-LPIPS (AlexNet)",
}  # the other metrics in capitals


@dataclass(frozen=True)
class Measurement:
    """Metrics of a model's reconstructions.

    Attributes:
        data: name of the images.
        conditions: number and size of the images, and whatever else determines the metrics.
        rows: by label, such as "model" or that of a yardstick, metrics by name; None stands for an infinite one. The
            first row is the model's.
    """

    data: str
    conditions: str
    rows: Mapping[str, Mapping[str, float | None]]


def make_card(
    model: "Autoencoder",
    title: str | None = None,
    sections: Sequence[str] = (),
    measurements: Sequence[Measurement] = (),
) -> ModelCard:
    """Returns the card of a model.

    Its licence is "unknown": set `card.data.license` to an identifier of the Hub, such as "apache-2.0".

    Args:
        model: autoencoder that the card describes.
        title: name of the model; default: its class.
        sections: Markdown texts that follow the description of the model, each with its heading.
        measurements: metrics of the model.
    """
    cls = type(model)
    title = title or cls.__name__
    tags = ["litevae", "autoencoder", "vae", "image-reconstruction"]
    data = ModelCardData(license=UNKNOWN_LICENSE, library_name="diffusers", tags=tags, model_name=title)
    module = cls.__module__.partition(".")[0] if cls.__module__.startswith("diffusers") else cls.__module__
    text = f"""
# {title}

{describe_model(model)}

## How to load it

```python
from {module} import {cls.__name__}

vae = {cls.__name__}.from_pretrained("{PATH}")
latents = vae.encode(images).latent_dist.sample()  # images (N, {model.config.in_channels}, H, W) in [-1, 1]
images = vae.decode(latents).sample
```

"""
    if module != "diffusers":
        text += """
It takes the place of `AutoencoderKL` in diffusers' pipelines whose latents have this shape. Import the class, as above,
before you load a pipeline that was saved with it.
"""
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    for section in sections:
        card.text += f"\n{section.strip()}\n"
    for measurement in measurements:
        add_measurement(card, measurement)
    return card


def describe_model(model: "Autoencoder") -> str:
    """Returns a sentence on a model's architecture, and one on its latents."""
    config: Mapping[str, Any] = model.config
    encoder, decoder = (
        sum(parameter.numel() for parameter in part.parameters()) / 1e6
        for part in (model.encoder, model.decoder)
    )
    if "extractor_channels" in config:
        kind = "A [LiteVAE](https://arxiv.org/abs/2405.14477)"
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
        defaults = PRESETS["litevae-b"] | {"encoder_num_groups": 32}
        for name, settings in PRESETS.items():
            wanted = defaults | settings
            if all(own[key] == (list(v) if isinstance(v, tuple) else v) for key, v in wanted.items()):
                kind += f" of size {name}"
    else:
        kind = f"An autoencoder of the class `{type(model).__name__}`, as Stable Diffusion's"
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return (
        f"{kind}, with {encoder:.2f} M parameters in the encoder and {decoder:.2f} M in the decoder. A latent has "
        f"{config['latent_channels']} channels and 1/{factor} of the image's height and width, which are multiples of "
        f"{factor}. `scaling_factor` and `shift_factor`, by which pipelines normalise latents, are in `config.json`."
    )


def add_measurement(card: ModelCard, measurement: Measurement) -> None:
    """Adds a table of metrics to a card's text, and the model's own to its header."""
    first = next(iter(measurement.rows.values()))
    names = list(first)
    headings = {name: HEADINGS.get(name, name.upper()) for name in names}
    lines = [
        f"\n## Metrics on {measurement.data}\n",
        f"{measurement.conditions}\n",
        f"| | {' | '.join(headings.values())} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, values in measurement.rows.items():
        cells = (values.get(name) for name in names)
        lines.append(f"| {label} | {' | '.join('-' if v is None else f'{v:.4g}' for v in cells)} |")
    card.text = f"{card.text.rstrip()}\n" + "\n".join(lines) + "\n"
    card.data["eval_results"] = [
        *(card.data.get("eval_results") or []),
        *(
            EvalResult(
                task_type="image-to-image",
                task_name="Image reconstruction",
                dataset_type=measurement.data,
                dataset_name=measurement.data,
                metric_type=name,
                metric_name=headings[name],
                metric_value=value,
            )
            for name, value in first.items()
            if value is not None
        ),
    ]


def read_card(folder: Path) -> ModelCard | None:
    """Returns the card in the folder of a model, or None if there is none.

    Raises:
        ValueError: README.md cannot be read, or its header is not that of a card.
    """
    file = folder / README
    if not file.is_file():
        return None
    try:
        return ModelCard(file.read_text(encoding="utf-8"))
    except Exception as error:  # YAML and the Hub's classes raise many kinds
        raise ValueError(f"{file}: not a model card: {error}") from None


def for_repository(card: ModelCard, repo_id: str) -> str:
    """Returns the content of a card whose example loads the model from a repository of the Hub."""
    return str(card).replace(f'from_pretrained("{PATH}")', f'from_pretrained("{repo_id}")')
