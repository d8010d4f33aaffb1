"""Distillation from the teacher's latents that `litevae encode` has stored."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from litevae.data.crops import CropSettings, TrainingCrops
from litevae.data.pixels import to_model_range
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents import LatentDataset, Settings, encode_images
from litevae.models.loading import load_model
from litevae.training import load_config, train
from litevae.training.teacher import Teacher
from litevae.training.teacher_latents import EncodedImages, TaughtCrops, collate_taught

SIZE = 32


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, sd, photographs):
    """A function that encodes the photographs, one of which is broken, with the teacher."""

    def encode(mirror=True, images=photographs, crop="middle"):
        folder = tmp_path_factory.mktemp("latents") / "latents"
        settings = Settings(SIZE, "fp32", mirror, shard_size=4, crop=crop)
        encode_images(
            load_model(sd / "vae"),
            open_images(str(images)),
            folder,
            settings,
            4,
            workers=0,
            max_bad_fraction=1,
        )
        return folder

    return encode


@pytest.fixture(scope="session")
def latents(encoded):
    return encoded()


@pytest.fixture
def options(latents, photographs):
    return [f"data.train={photographs}", "data.crop=middle", f"teacher_latents={latents}"]


def test_a_crop_has_the_latent_that_the_teacher_gives_it(sd, latents, photographs):
    dataset = LatentDataset(latents)
    images = EncodedImages(open_images(str(photographs)), dataset)
    assert [Path(images.key(i)).stem for i in range(len(images))] == [f"{i:02d}" for i in range(11) if i != 5]
    crops = TrainingCrops(images, CropSettings(SIZE, "middle", True, 0.5), seed=0, length=100)
    taught = TaughtCrops(crops, dataset)
    items = [taught[i] for i in range(20)]
    assert {item.item.mirrored for item in items} == {False, True}
    batch = collate_taught(items)
    vae = AutoencoderKL.from_pretrained(sd / "vae")
    with torch.no_grad():
        posterior = vae.encode(to_model_range(batch.images)).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], 1)
    torch.testing.assert_close(batch.moments, expected, rtol=1e-3, atol=1e-3)  # float16
    assert batch.bad == []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_that_of_the_teacher_itself(
    sd, options, distilling, logged, no_pictures, monkeypatch, tmp_path, encoded, photographs, accumulation
):
    (tmp_path / "images").mkdir()
    for path in photographs.rglob("0[0-3].png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    settings = [f"data.train={tmp_path / 'images'}", "data.crop=middle", "max_steps=4", "ema_decay=0"]
    settings += [f"optimizer.accumulation={accumulation}"]
    live = logged(train(distilling(sd, *settings, name="live")).output_dir)
    monkeypatch.setattr(Teacher, "forward", None)  # is not called
    folder = encoded(images=tmp_path / "images")
    stored = logged(train(distilling(sd, *settings, f"teacher_latents={folder}", name="stored")).output_dir)
    for one, other in zip(live, stored, strict=True):
        for name in ("loss", "teacher_kl", "teacher_mean", "teacher_logvar"):
            assert other[name] == pytest.approx(one[name], rel=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["data.size=64"], "holds latents of 32 x 32 pixels, and a crop has 64"),
            (["stages=[{start: 2, size: 64}]"], "holds latents of 32 x 32 pixels, and a crop has 64"),
            (["data.train=demo"], "was encoded from other images than data.train=demo"),
            (["teacher_latents=nowhere"], "nowhere: no such folder"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_latents_that_do_not_fit(self, sd, options, distilling, settings, message):
        with pytest.raises(UserError, match=message):
            train(distilling(sd, *options, *settings, "max_steps=2"))

    def test_another_teacher(self, options, distilling, save_teacher, tmp_path):
        other = save_teacher(tmp_path / "other", layers_per_block=2)
        with pytest.raises(UserError, match="was encoded with another model than the teacher"):
            train(distilling(other, *options, "max_steps=1"))

    def test_mirrored_images_that_were_not_encoded(self, sd, options, distilling, encoded, no_pictures):
        config = [*options, f"teacher_latents={encoded(mirror=False)}", "max_steps=1"]
        with pytest.raises(UserError, match=r"encode with --mirror, or set data.flip=false"):
            train(distilling(sd, *config))
        train(distilling(sd, *config, "data.flip=false"))

    def test_whole_images(self, sd, options, distilling, encoded):
        with pytest.raises(UserError, match="does not hold the latents of middle squares"):
            train(distilling(sd, *options, f"teacher_latents={encoded(crop='shorter')}", "max_steps=1"))

    def test_settings(self, options):
        with pytest.raises(UserError, match="teacher_latents needs the teacher"):
            load_config("distill", options)
        with pytest.raises(UserError, match=r"data.crop must be middle with teacher_latents, .* got random"):
            load_config("distill", [*options, "teacher=x", "data.crop=random"])
