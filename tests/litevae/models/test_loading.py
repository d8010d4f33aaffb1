import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.models.baseline import SmallEncoderVAE
from litevae.models.loading import load_model, model_folder
from litevae.models.weight_files import WEIGHTS
from litevae.training import load_config
from litevae.training.build import build_model

BLOCKS = {"block_out_channels": (16, 16), "layers_per_block": 1}
SETTINGS = [
    "model.block_out_channels=[16,16]",
    "model.layers_per_block=1",
    "model.num_groups=4",
    "model.latent_channels=4",
    "data.size=32",
]


def litevae(seed: int) -> LiteVAE:
    """Returns a model of the architecture that SETTINGS describe."""
    torch.manual_seed(seed)
    architecture = {"decoder_norm": "smc", "output_type": "wavelet"}
    return LiteVAE.from_preset("litevae-s", **BLOCKS, num_groups=4, **architecture)


def diffusers_vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        **BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def initialised(folder) -> nn.Module:
    """Returns the model that a training run begins with if `init` is `folder`."""
    return build_model(load_config("demo", [*SETTINGS, f"init={folder}"]))


def same(first: nn.Module, second: nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestFolders:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        """A checkpoint whose averaged weights, of seed 1, differ from the latest ones, of seed 2."""
        folder = tmp_path / "step-00000010"
        litevae(1).save_pretrained(folder / "ema")
        litevae(2).save_pretrained(folder / "model")
        (folder / "manifest.json").write_text("{}")
        return folder

    @pytest.mark.parametrize("load", [load_model, initialised])
    def test_of_a_checkpoint_the_averaged_weights_are_loaded(self, checkpoint, load, capsys):
        assert model_folder(checkpoint) == checkpoint / "ema"
        assert same(load(checkpoint), litevae(1))
        line = f"{checkpoint}: loading the averaged weights, {checkpoint / 'ema'}\n"
        assert capsys.readouterr().err == line

    @pytest.mark.parametrize("load", [load_model, initialised])
    def test_of_a_checkpoint_without_average_the_raw_weights_are_loaded(self, tmp_path, load, capsys):
        litevae(1).save_pretrained(tmp_path / "model")
        (tmp_path / "manifest.json").write_text("{}")
        assert same(load(tmp_path), litevae(1))
        line = f"{tmp_path}: loading the raw (not averaged) weights, {tmp_path / 'model'}\n"
        assert capsys.readouterr().err == line

    @pytest.mark.parametrize("load", [load_model, initialised])
    @pytest.mark.parametrize(("name", "seed"), [("ema", 1), ("model", 2)])
    def test_either_can_be_chosen_by_its_folder(self, checkpoint, load, name, seed, capsys):
        assert same(load(checkpoint / name), litevae(seed))
        assert capsys.readouterr().err == ""

    def test_only_the_first_process_reports_it(self, checkpoint, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        assert same(load_model(checkpoint), litevae(1))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("load", [load_model, initialised])
    def test_of_a_run_or_a_checkpoint_without_average(self, tmp_path, load, capsys):
        litevae(1).save_pretrained(tmp_path / "run" / "model")
        assert model_folder(tmp_path / "run") == tmp_path / "run" / "model"
        assert same(load(tmp_path / "run"), litevae(1))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("pipeline", [False, True])
    @pytest.mark.parametrize("name", ["sd", "ema"])
    def test_of_diffusers(self, tmp_path, pipeline, name, capsys, monkeypatch):
        expected, folder = diffusers_vae(), tmp_path / name
        expected.save_pretrained(folder / "vae" if pipeline else folder)
        monkeypatch.chdir(tmp_path)
        for path in (f"diffusers:{folder}", f"diffusers:{name}"):
            loaded = load_model(Path(path))
            assert type(loaded) is AutoencoderKL
            assert same(loaded, expected)
        assert capsys.readouterr().err == ""

    def test_of_a_baseline(self, tmp_path):
        expected = SmallEncoderVAE((32, 32), **BLOCKS, norm_num_groups=4)
        expected.save_pretrained(tmp_path / "run" / "model")
        loaded = load_model(tmp_path / "run")
        assert type(loaded) is SmallEncoderVAE
        assert same(loaded, expected)

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        litevae(1).save_pretrained(tmp_path / "run" / "model")
        for name, message in {
            "nowhere": "nowhere: no such folder",
            "file": "file: is a file, not a model folder",
            "empty": "empty: not a model: there is no config.json in it",
            "diffusers:nowhere": "nowhere: no such folder",
            f"diffusers:{tmp_path}/run": "run: not a model",  # diffusers has no such folders
        }.items():
            path = Path(name) if "diffusers:" in name else tmp_path / name
            with pytest.raises(UserError, match=message) as caught:
                load_model(path)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", r"config\.json: not a model's configuration"),
            ("[]", r"config\.json: not a model's configuration"),
            ("{}", "not a LiteVAE but something else"),
            ('{"_class_name": "UNet2DModel"}', "not a LiteVAE but UNet2DModel"),
        ],
    )
    def test_another_configuration_is_refused(self, tmp_path, config, message):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)

    def test_diffusers_takes_no_litevae(self, tmp_path):
        litevae(1).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="not an AutoencoderKL but LiteVAE"):
            load_model(Path(f"diffusers:{tmp_path}"))

    def test_a_baseline_of_other_shapes_is_explained_without_diffusers_advice(self, tmp_path):
        diffusers_vae().save_pretrained(tmp_path)
        weights = load_file(tmp_path / WEIGHTS)
        weights["decoder.conv_in.bias"] = torch.zeros(3)
        save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
        message = (
            r"cannot be loaded: decoder\.conv_in\.bias is \(3,\) in .*\.safetensors and \(16,\) in the model"
        )
        with pytest.raises(UserError, match=message) as caught:
            load_model(tmp_path)
        assert "low_cpu_mem_usage" not in str(caught.value)

    @pytest.mark.parametrize("damage", ["missing", "cut", "lacks", "shape", "settings"])
    def test_damaged_files_are_one_line(self, tmp_path, damage):
        litevae(1).save_pretrained(tmp_path)
        path, message = tmp_path / WEIGHTS, "cannot be loaded"
        weights = load_file(path)
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:1000])
        elif damage == "lacks":
            del weights["decoder.conv_in.bias"]
            save_file(weights, path, {"format": "pt"})
            message = r"its weights lack decoder\.conv_in\.bias"
        elif damage == "shape":
            weights["decoder.conv_in.bias"] = torch.zeros(3)
            save_file(weights, path, {"format": "pt"})
        else:
            config = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps({**config, "finest_level": 7}))
            message = "finest_level must be from 1 to 1, got 7"
        with pytest.raises(UserError, match=message) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
