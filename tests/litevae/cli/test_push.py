"""`litevae push`, to a Hub on this machine."""

import json

import pytest
from huggingface_hub import ModelCard

from litevae import LiteVAE
from litevae.files import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"
YARDSTICKS = {"mean colour": {"psnr": 9.5, "rfid": None}}
EVALUATION = {
    "metrics": {"rfid": 1.5, "psnr": 20.25},
    "yardsticks": YARDSTICKS,
    "data": "/home/somebody/photographs",
    "count": 3,
    "crop": "middle square",
    "latent": "mode",
    "precision": "fp32",
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(litevae, tmp_path):
    """The folder of a run of one step."""
    folder = tmp_path / "secret" / "run"
    settings = ["model.block_out_channels=[16,16,16]", "model.layers_per_block=1", "model.num_groups=4"]
    settings += ["data.size=32", "data.batch_size=1", "data.workers=0", "tracker=none", "max_steps=1"]
    litevae("train", "demo", *settings, f"output_dir={folder}")
    return folder


def test_uploads_a_run_with_its_card(litevae, hub, run, tmp_path):
    evaluation = {**EVALUATION, "weights": {WEIGHTS: sha256(run / "model" / WEIGHTS)}}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    output = litevae(
        "push", run, "me/vae", "--license", "mit", "--private", "--metrics", tmp_path / "eval.json"
    )
    assert output == f"{hub.url}/me/vae/commit/0123456789abcdef0123456789abcdef01234567\n"
    files = hub.repositories["me/vae"]
    assert hub.private["me/vae"]
    assert files[WEIGHTS] == (run / "model" / WEIGHTS).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    validation = json.loads((run / "metrics.json").read_text())["validation"]
    found = {
        (result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results
    }
    assert found == {
        ("demo", "psnr"): validation["psnr"],
        ("demo", "ssim"): validation["ssim"],
        ("photographs", "rfid"): 1.5,
        ("photographs", "psnr"): 20.25,
    }
    for row in (
        f"| model | {validation['psnr']:.4g} | {validation['ssim']:.4g} |",
        f"| mean colour | {validation['yardsticks']['mean_colour']['psnr']:.4g} |",
        "| mean colour | - | 9.5 |",
    ):
        assert row in card.text
    assert "max_steps: 1" in card.text
    assert "secret" not in card.content
    assert "somebody" not in card.content
    LiteVAE.from_pretrained("me/vae")


def test_a_card_on_the_hub_stays_until_told_otherwise(litevae, hub, model):
    hub.repositories["me/vae"] = {"README.md": b"---\nlicense: mit\n---\nMine.\n"}
    assert "has a card, which stays: --overwrite replaces it" in litevae("push", model, "me/vae")
    assert hub.repositories["me/vae"]["README.md"].endswith(b"Mine.\n")
    output = litevae("push", model, "me/vae", "--overwrite")
    assert "the licence is unknown: give --license" in output
    assert 'from_pretrained("me/vae")' in hub.repositories["me/vae"]["README.md"].decode()


def test_a_baseline_has_a_card_as_well(litevae, hub, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "kl")
    litevae("push", tmp_path / "kl", "me/kl")
    assert "from diffusers import AutoencoderKL" in hub.repositories["me/kl"]["README.md"].decode()


def test_mistakes_are_one_line(fails, hub, model, tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    assert "eval.json: cannot be read" in fails("push", model, "me/vae", "--metrics", file)
    file.write_text("[]")
    assert "eval.json: not a result of litevae eval" in fails("push", model, "me/vae", "--metrics", file)
    file.write_text(json.dumps({**EVALUATION, "weights": {}}))
    assert "was measured with other weights" in fails("push", model, "me/vae", "--metrics", file)
    assert "me/vae/x: cannot be uploaded to" in fails("push", model, "me/vae/x")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "Invalid username or password" in fails("push", model, "me/vae")
    assert hub.repositories == {}
