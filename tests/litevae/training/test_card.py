"""The card of a training run."""

import json
from pathlib import Path

from litevae import LiteVAE
from litevae.training import load_config, train
from litevae.training.card import make_run_card


def test_its_settings_repeat_the_run(tiny, no_pictures, tmp_path):
    config = tiny("max_steps=1", "checkpoint.every=0")
    folder = train(config).output_dir
    model = LiteVAE.from_pretrained(folder / "model")
    text = model.card.text
    (tmp_path / "settings.yaml").write_text(text.partition("```yaml\n")[2].partition("\n```")[0])
    assert "trained this model for 1 step in\n" in text
    again = load_config(str(tmp_path / "settings.yaml"), [])
    assert Path(config.data.validation).name == again.data.validation != config.data.validation
    again.output_dir, again.data.validation = config.output_dir, config.data.validation
    again.precision = config.precision
    assert again == config
    assert str(tmp_path) not in model.card.content

    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"| model | {metrics['validation']['psnr']:.4g} |" in text
    metrics["validation"] |= {"lpips": 0.25, "st_lpips": 0.5}  # further names in validate_metrics
    text = make_run_card(model, config, metrics).text
    assert "| | LPIPS | ST-LPIPS (AlexNet) | PSNR (dB) | SSIM |" in text
    assert "| model | 0.25 | 0.5 | " in text
    metrics["validation"] |= {"count": 0, "psnr": None}
    metrics["complete"] = False
    text = make_run_card(model, config, metrics).text
    assert "for 1 step, not all of them, in" in text
    assert "## Metrics" not in text
