"""`examples/train_on_a_folder.py` in a short form."""

from litevae import LiteVAE


def test_trains_and_loads_the_model(load_example, images, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [str(images), "--steps", "2", "--size", "32", "--output", str(output)]
    load_example("train_on_a_folder").main(arguments)

    assert (output / "reconstructions.png").stat().st_size > 0
    assert (output / "curves.png").stat().st_size > 0
    assert LiteVAE.from_pretrained(output / "model").config.latent_channels == 12
    printed = capsys.readouterr().out
    assert "2 steps in" in printed
    assert "images (1, 3, 32, 32) -> latents (1, 12, 4, 4) -> images (1, 3, 32, 32)" in printed
