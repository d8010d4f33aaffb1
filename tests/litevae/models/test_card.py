"""Model cards, and that a model keeps its own."""

import copy

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from litevae import LiteVAE
from litevae.models import PRESETS, SmallEncoderVAE
from litevae.models.card import Measurement, add_measurement, make_card, read_card

ROWS = {"model": {"psnr": 25.125, "rfid": 2.0}, "mean colour": {"psnr": 10.0}}


@pytest.mark.parametrize("preset", PRESETS)
def test_names_the_size(preset):
    with torch.device("meta"):
        model = LiteVAE.from_preset(preset, latent_channels=12)
    text = make_card(model).text
    assert f"of size {preset}, with " in text
    assert "12 channels and 1/8 of the image's height and width" in text
    assert "from litevae import LiteVAE\n" in text


def test_other_classes_have_no_size():
    with torch.device("meta"):
        text = make_card(SmallEncoderVAE()).text
    assert "An autoencoder of the class `SmallEncoderVAE`" in text
    assert "6.79 M parameters in the encoder" in text
    assert "from litevae.models import SmallEncoderVAE\n" in text


def test_metrics_are_in_the_header_and_beside_the_yardsticks_in_the_text(make, tmp_path):
    card = make_card(make(), "A name", ["## Section"], [Measurement("cats", "3 images.", ROWS)])
    card.save(tmp_path / "README.md")
    card = read_card(tmp_path)
    add_measurement(card, Measurement("dogs", "4 images.", {"model": {"ssim": 0.5}}))
    card = ModelCard(str(card))
    # The Hub's own classes read what it shows of a card.
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "A name"
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in results] == [
        ("cats", "psnr", 25.125),
        ("cats", "rfid", 2.0),
        ("dogs", "ssim", 0.5),
    ]
    assert (
        "| | PSNR (dB) | rFID |\n| --- | ---: | ---: |\n| model | 25.12 | 2 |\n| mean colour | 10 | - |\n"
        in card.text
    )
    assert card.text.index("## Section") < card.text.index("## Metrics on cats") < card.text.index("on dogs")
    assert card.data.license == "unknown"


class TestOfAModel:
    def test_it_is_kept_from_folder_to_folder(self, make, tmp_path):
        model = make()
        model.card.data.license = "mit"
        model.card.text += "\nMine.\n"
        model.save_pretrained(tmp_path / "one")
        copy.deepcopy(LiteVAE.from_pretrained(tmp_path / "one")).save_pretrained(tmp_path / "two")
        assert (tmp_path / "two" / "README.md").read_text() == (tmp_path / "one" / "README.md").read_text()
        assert (read_card(tmp_path / "two").data.license, model.card.text.endswith("\nMine.\n")) == (
            "mit",
            True,
        )

    def test_a_readme_in_the_folder_stays(self, make, tmp_path):
        (tmp_path / "README.md").write_text("Mine.")
        make().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "Mine."

    def test_a_damaged_one_does_not_keep_the_model_from_loading(self, make, tmp_path):
        make().save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text("---\n- no\n- mapping\n---\n")
        with pytest.warns(UserWarning, match=r"README.md: not a model card: .*: the model gets a new one"):
            model = LiteVAE.from_pretrained(tmp_path)
        assert model.card.data.license == "unknown"

    def test_other_processes_than_the_main_one_write_none(self, make, tmp_path):
        make().save_pretrained(tmp_path, is_main_process=False)
        assert not (tmp_path / "README.md").exists()
