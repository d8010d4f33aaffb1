"""`litevae features`."""

from pathlib import Path

from litevae.cli.common import (
    CountOption,
    DataArgument,
    FolderOption,
    ModelsArgument,
    NamesOption,
    OverwriteOption,
    SizeOption,
    make_folder,
    name_each,
    provenance,
    results,
    write_json,
)
from litevae.errors import UserError
from litevae.models.loading import load_model

PICTURES = 4  # images in features.png


def features(
    models: ModelsArgument,
    data: DataArgument,
    output: FolderOption,
    names: NamesOption = None,
    size: SizeOption = 256,
    count: CountOption = 16,
    overwrite: OverwriteOption = False,
) -> None:
    """Show the feature maps of decoders' last blocks and their imbalance, as in the paper's Figure 3.

    \b
    Example: litevae features runs/group runs/smc path/to/images -o features --names GroupNorm,SMC
             litevae features diffusers:path/to/sd-vae runs/imagenet-b path/to/images -o features
             litevae features runs/demo demo -o features --size 64

    Writes features.json, and features.png with some images and the root mean square of the features over the
    channels for each model.

    The imbalance is the 99.9th percentile of these values divided by their median, averaged over the images; 1 is
    balanced. An eighth of the side is left out at each border, where padding changes the features. The measure is
    ours: the paper shows pictures only.
    """
    record_file, picture = results(output, "features.json", "features.png", overwrite=overwrite)
    paths = name_each(models, names)
    autoencoders = {name: load_model(path) for name, path in paths.items()}

    import torch

    from litevae.data.sources import open_images
    from litevae.data.squares import load_validation
    from litevae.evaluation.feature_maps import draw_feature_maps, feature_magnitude, imbalance, inside
    from litevae.evaluation.resolution import check_takes
    from litevae.files import replacing
    from litevae.models.interface import shared_pixel_format

    images_of = shared_pixel_format(autoencoders)
    for name, model in autoencoders.items():
        check_takes(name, model, size)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
    images = load_validation(open_images(data, images_of), size, count).images
    magnitudes, imbalances = {}, {}
    for name, model in autoencoders.items():
        magnitudes[name] = [inside(feature_magnitude(model, pixels)) for _, pixels in images]
        try:
            imbalances[name] = imbalance(magnitudes[name])
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    make_folder(output)
    step = max(1, len(images) // PICTURES)
    shown = [(Path(label).stem, inside(pixels)) for label, pixels in images][::step][:PICTURES]
    maps = {name: each[::step][:PICTURES] for name, each in magnitudes.items()}
    with replacing(picture) as path:
        draw_feature_maps(shown, maps, imbalances, path)
    record = {
        "count": len(images),
        "latent": "mode",
        "imbalance": "99.9th percentile / median of the RMS over channels, mean over the images, without an eighth "
        "of the side at each border",
        "models": [
            {
                "name": name,
                **provenance(paths[name], data, size, pixels=str(images_of)),
                "imbalance": imbalances[name],
            }
            for name in paths
        ],
    }
    write_json(record, record_file)

    print(f"{len(images)} images, middle square, {size} x {size}; mode of the posterior")
    width = max(len(name) for name in paths)
    for name, value in imbalances.items():
        print(f"{name:{width}}  imbalance {value:.2f}")
    print(f"see {record_file} and {picture}")
