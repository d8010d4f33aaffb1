import json


def test_train_short_form(litevae, tmp_path):
    output = litevae(
        "train", "demo", "max_steps=2", "data.size=16", "data.batch_size=1", f"output_dir={tmp_path}"
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert f"PSNR {metrics['validation']['psnr']:.2f} dB" in output
    assert "2 steps" in output
    assert " (below the Haar yardstick); Haar yardstick: 28.53 dB, 0.728\n" in output
    # The folder of the run serves as the model.
    assert "latent: 12 x 32 x 32" in litevae("info", tmp_path)
