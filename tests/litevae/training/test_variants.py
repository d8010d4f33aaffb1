"""Training of the encoder variants."""

import json

import pytest
import torch

from litevae import LiteVAE
from litevae.training import train
from litevae.training.trainer import Trainer

DEMO = "data.validation="  # validates on the demo's own photograph


def logged(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        ["model.encoder_type=dwt", "model.latent_channels=12", "loss.kl=0", "freeze_encoder=true"],
        ["model.extractor=nafnet", "model.shared_extractor=true", "model.aggregator=vit", DEMO],
        ["model.encoder_norm=smc", "model.finest_level=2"],
    ],
    ids=["dwt", "nafnet and vit", "smc"],
)
def test_a_variant_trains_and_reloads(tiny, variant_settings, no_pictures, settings):
    config = tiny(*settings, "max_steps=2", "ema_decay=0.9")
    result = train(config)
    model = LiteVAE.from_pretrained(result.output_dir / "model")
    for name in variant_settings:
        assert model.config[name] == getattr(config.model, name)
    assert result.psnr > 0
    lines = logged(result.output_dir)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert all(("kl" in line) == (config.model.encoder_type == "learned") for line in lines)


def test_vit_is_shown_images_of_its_size(tiny):
    """The demo's photographs stay whole for models that take any size."""
    for aggregator, shapes in (("unet", {(300, 451, 3)}), ("vit", {(32, 32, 3)})):
        trainer = Trainer(tiny(f"model.aggregator={aggregator}", DEMO, name=aggregator))
        assert {pixels.shape for _, pixels in trainer.data.validation} == shapes
        assert {pixels.shape for _, pixels in trainer.data.shown} == shapes


def test_a_model_without_encoder_parameters_resumes_to_the_same_weights(tiny, no_pictures):
    dwt = [
        "model.encoder_type=dwt",
        "model.latent_channels=12",
        "loss.kl=0",
        "checkpoint.every=1",
        "optimizer.schedule=constant",
    ]
    whole = train(tiny(*dwt, "max_steps=2", name="whole"))
    train(tiny(*dwt, "max_steps=1", name="parts"))
    parts = train(tiny(*dwt, "max_steps=2", "resume=auto", name="parts"))
    first, second = (LiteVAE.from_pretrained(run.output_dir / "model").state_dict() for run in (whole, parts))
    assert all(torch.equal(second[name], value) for name, value in first.items())
