import numpy as np
import pytest
from PIL import Image
from skimage import data

from litevae.experiments.measure import KINDS, named_images, parameters, slug
from litevae.experiments.spec import Kind, RunSpec
from litevae.experiments.trained import Row, Trained
from litevae.models import LiteVAE
from litevae.training import load_config


def test_every_kind_of_experiment_is_measured():
    assert set(KINDS) == set(Kind.__args__)


@pytest.mark.parametrize(
    ("name", "expected"), [("SD-VAE, small", "sd-vae-small"), ("128 + 256", "128-256"), ("A", "a")]
)
def test_slugs_suit_file_names(name, expected):
    assert slug(name) == expected


def test_images_are_named_by_their_files(tmp_path):
    Image.fromarray(data.chelsea()[:64, :64]).save(tmp_path / "cat.png")
    ((name, pixels),) = named_images(str(tmp_path), 64, 3)
    assert name == "cat"
    np.testing.assert_array_equal(pixels, data.chelsea()[:64, :64])


def test_parameters_are_counted_where_the_paper_prints_them(tmp_path):
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    model.save_pretrained(tmp_path / "model")
    run = Trained(load_config("demo", [f"output_dir={tmp_path}"]), {})
    millions = sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6
    row = Row(RunSpec(row=["S"], paper={"parameters (M)": 1.03, "psnr": 30.0}), [run])
    assert parameters(row, run) == {"parameters (M)": pytest.approx(millions)}
