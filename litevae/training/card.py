"""The model card of a training run: how the model was trained, and what its validation measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from litevae import settings
from litevae.data.remote import redact_pattern
from litevae.evaluation.metrics import METRICS
from litevae.evaluation.yardsticks import yardstick_labels
from litevae.models.card import Measurement, make_card
from litevae.models.interface import Autoencoder
from litevae.training.config import Config
from litevae.training.teacher import Teacher, describe_teacher


def make_run_card(
    model: Autoencoder, config: Config, metrics: Mapping[str, Any], teacher: Teacher | None = None
) -> ModelCard:
    """Returns the card of a run's model.

    Args:
        model: model of the run.
        config: settings of the run. Only the last parts of its paths go into the card.
        metrics: content of the run's metrics.json.
        teacher: teacher of the run, if it has one.
    """
    sections = [] if teacher is None else [describe_teacher(teacher)]
    return make_card(
        model,
        f"{type(model).__name__} {Path(config.output_dir).name}",
        [*sections, describe_run(config, metrics)],
        measurements(model, metrics["validation"]),
    )


def describe_run(config: Config, metrics: Mapping[str, Any]) -> str:
    """Returns the section of a card on the training, with all settings."""
    steps, complete = metrics["steps"], metrics["complete"]
    public = replace(
        config,
        output_dir=last_part(config.output_dir),
        init=last_part(config.init),
        init_decoder=last_part(config.init_decoder),
        teacher=last_part(config.teacher),
        teacher_latents=last_part(config.teacher_latents),
        resume=last_part(config.resume),
        data=replace(
            config.data,
            train=last_part(redact_pattern(config.data.train)),
            validation=last_part(redact_pattern(config.data.validation)),
        ),
    )
    return f"""
## Training

`litevae train` trained this model for {steps} step{"s" * (steps != 1)}{"" if complete else ", not all of them,"} in
{metrics["precision"]}. `litevae train settings.yaml data.train=FOLDER` repeats the run with these settings:

<details>
<summary>settings.yaml</summary>

```yaml
{settings.dump(public).strip()}
```

</details>
"""


def last_part(path: str) -> str:
    """Returns the last part of a path or URL: the rest is nobody else's business."""
    return path.rstrip("/").rpartition("/")[2]


def measurements(model: Autoencoder, validation: Mapping[str, Any]) -> list[Measurement]:
    """Returns the last validation of a run beside its yardsticks; nothing if there was none."""
    if not validation["count"] or validation["psnr"] is None:
        return []
    labels = yardstick_labels(model)
    rows: dict[str, dict[str, float | None]] = {
        "model": {name: validation[name] for name in METRICS if name in validation}
    }
    rows |= {labels[name]: values for name, values in validation["yardsticks"].items()}
    count = validation["count"]
    conditions = (
        f"{count} image{'s' * (count != 1)} at the end of training; {validation['measured_on']}. The other rows are "
        "yardsticks without any learning."
    )
    return [Measurement(last_part(validation["images"]), conditions, rows)]
