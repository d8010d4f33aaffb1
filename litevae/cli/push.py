"""`litevae push`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litevae.cli.common import ModelArgument, model_provenance
from litevae.errors import UserError, shorten
from litevae.files import read_json
from litevae.models.loading import load_model, model_folder

if TYPE_CHECKING:
    from litevae.models.card import Measurement


def push(
    model: ModelArgument,
    repository: Annotated[
        str,
        typer.Argument(
            metavar="USER/NAME", help="Repository on the Hub, which is made if it does not exist."
        ),
    ],
    license: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Licence for the card, as the Hub writes it, such as apache-2.0."),
    ] = None,
    metrics: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A result of litevae eval for the card; may be repeated."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the card of a repository that has one.")
    ] = False,
) -> None:
    """Upload a model and its card to Hugging Face's Hub.

    \b
    Example: litevae push runs/imagenet-b user/litevae-b --license apache-2.0
             litevae push runs/imagenet-b user/litevae-b --metrics imagenet-b.json --overwrite

    Uploads config.json and the weights as they are, and README.md, the card of the model: its architecture, how to
    load it, the settings it was trained with, its validation beside the yardsticks, and for a distilled model whose
    latents it makes. Training writes the card beside the model, where you can edit it before the upload. --metrics
    adds what litevae eval has measured with the same weights. hf auth login stores the token that the Hub asks for.
    """
    autoencoder = load_model(model)
    folder = model_folder(model)

    from huggingface_hub import CommitOperationAdd, create_commit, create_repo, file_exists

    from litevae.models.card import (
        README,
        UNKNOWN_LICENSE,
        add_measurement,
        for_repository,
        make_card,
        read_card,
    )

    try:
        card = read_card(folder) or make_card(autoencoder)
    except ValueError as error:
        raise UserError(str(error)) from None
    card.data["license"] = license or card.data.get("license") or UNKNOWN_LICENSE
    weights = model_provenance(model)["weights"]
    for file in metrics or ():
        add_measurement(card, read_evaluation(file, weights))
    files = [folder / "config.json", *sorted(folder.glob("diffusion_pytorch_model*"))]
    operations = [CommitOperationAdd(file.name, file) for file in files]
    try:
        name = create_repo(repository, private=private or None, exist_ok=True).repo_id
        keeps_card = not overwrite and file_exists(name, README)
        if not keeps_card:
            operations.append(CommitOperationAdd(README, for_repository(card, name).encode()))
        url = create_commit(
            name, operations, commit_message=f"Upload {type(autoencoder).__name__}"
        ).commit_url
    except Exception as error:  # the Hub's own, those of two HTTP libraries, and the operating system's
        raise UserError(f"{repository}: cannot be uploaded to: {error}") from None
    print(url)
    if keeps_card:
        print(f"{name} has a card, which stays: --overwrite replaces it")
    elif card.data["license"] == UNKNOWN_LICENSE:
        print("the card says that the licence is unknown: give --license, with --overwrite")


def read_evaluation(file: Path, weights: Mapping[str, str]) -> "Measurement":
    """Returns what `litevae eval` has measured.

    Args:
        file: JSON file that `litevae eval` has written.
        weights: SHA-256 of each file of the model's weights.

    Raises:
        UserError: the file cannot be read, is no such file, or belongs to other weights.
    """
    from litevae.models.card import Measurement

    try:
        record: Any = read_json(file)
        if record["weights"] != weights:
            raise UserError(f"{file}: was measured with other weights than those of the model")
        rows = {"model": record["metrics"]}
        conditions = f"{record['count']} images, {record['crop']}; {record['latent']} of the posterior, "
        conditions += f"{record['precision']}. The yardsticks have not learned anything."
        if teacher := record.get("teacher"):
            rows["the teacher"] = teacher["metrics"]
            conditions += (
                " The mean of the latent differs from the teacher's by "
                f"{teacher['latent_errors']['sigmas']:.3g} standard deviations of the teacher's posterior."
            )
        rows |= record["yardsticks"]
        return Measurement(Path(record["data"]).name, conditions, rows)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a result of litevae eval: {shorten(error)}") from None
