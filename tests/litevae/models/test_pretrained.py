import json
import os
import re
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    AutoencoderTiny,
    AutoModel,
    UNet2DModel,
    VQModel,
)

from litevae import LiteVAE
from litevae.models.loading import load_model


@pytest.fixture
def autoencoder_kl() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


def assert_same(first: LiteVAE, second: LiteVAE) -> None:
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), atol=0, rtol=0)


class TestOtherModels:
    MESSAGE = (
        "that of AutoencoderKL, which has out_channels, down_block_types, up_block_types, not of LiteVAE: "
        r"load it with diffusers' AutoencoderKL, or its decoder into a LiteVAE with load_decoder \(init_decoder"
    )

    def test_the_folder_of_another_class_is_refused_at_once(self, autoencoder_kl, tmp_path):
        autoencoder_kl.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.MESSAGE):
            LiteVAE.from_pretrained(tmp_path)

    def test_so_is_its_configuration(self, autoencoder_kl):
        with pytest.raises(ValueError, match=self.MESSAGE):
            LiteVAE.from_config(autoencoder_kl.config)
        with pytest.raises(ValueError, match="that of UNet2DModel, not of LiteVAE"):
            LiteVAE.from_config({"_class_name": "UNet2DModel", "in_channels": 3})

    @pytest.mark.parametrize(
        "other",
        [
            AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
            AutoencoderKLWan(base_dim=4, z_dim=4),
            UNet2DModel(
                block_out_channels=(8,),
                down_block_types=("DownBlock2D",),
                norm_num_groups=4,
                up_block_types=("UpBlock2D",),
            ),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_a_model_whose_decoder_is_another_is_said_to_be_one(self, make, tmp_path, other):
        other.save_pretrained(tmp_path)
        name = type(other).__name__
        advice = f"load it with diffusers' {name}; a LiteVAE takes only the decoder of an AutoencoderKL"
        for load in (LiteVAE.from_pretrained, LiteVAE.from_config):
            with pytest.raises(
                ValueError, match=f"configuration is that of {name}, not of LiteVAE: {advice}"
            ):
                load(tmp_path)
        with pytest.raises(ValueError, match=f"^load_decoder: .* holds a model of class {name}: {advice}"):
            make().load_decoder(tmp_path)

    @pytest.mark.parametrize("kind", [AutoencoderKLFlux2, VQModel])
    def test_other_classes_with_the_same_decoder(self, make, latent, tmp_path, kind):
        torch.manual_seed(0)
        other = kind(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
        )
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"diffusers' {kind.__name__}, or its decoder into a LiteVAE"):
            LiteVAE.from_pretrained(tmp_path)
        model = make(use_1x1_conv=True)
        model.load_decoder(tmp_path)
        with torch.no_grad():
            expected = other.decoder(other.post_quant_conv(latent))
            torch.testing.assert_close(model.decode(latent).sample, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("given", ["folder", "file", "keyword", "subfolder"])
    @pytest.mark.filterwarnings("ignore:.*to pass a pretrained model name:FutureWarning")
    def test_a_path_of_a_configuration_is_checked_as_well(self, make, autoencoder_kl, tmp_path, given):
        def load(folder):
            if given == "keyword":
                return LiteVAE.from_config(pretrained_model_name_or_path=folder)
            if given == "subfolder":
                return LiteVAE.from_config(folder.parent, subfolder=folder.name)
            return LiteVAE.from_config(folder / "config.json" if given == "file" else folder)

        autoencoder_kl.save_config(tmp_path / "theirs")
        make().save_config(tmp_path / "ours")
        assert load(tmp_path / "ours").config.extractor_channels == 8
        with pytest.raises(ValueError, match=self.MESSAGE):
            load(tmp_path / "theirs")

    def test_a_pipeline_a_file_and_a_model_of_transformers(self, make, tmp_path):
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(ValueError, match="holds a whole pipeline: pass subfolder='vae'"):
            LiteVAE.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a file, not a model folder: load it with from_single_file"):
            LiteVAE.from_pretrained(tmp_path / "model_index.json")
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(ValueError, match="the configuration is that of clip, not of LiteVAE"):
            LiteVAE.from_pretrained(tmp_path)

    def test_own_and_partial_configurations_remain(self, make, tiny_config):
        class Own(LiteVAE):
            pass

        assert_same(make(), make())
        assert dict(LiteVAE.from_config(make().config).config) == dict(make().config)
        assert LiteVAE.from_config({**tiny_config, "latent_channels": 7}).config.latent_channels == 7
        config = json.loads(Own(**tiny_config).to_json_string())
        assert config["_class_name"] == "Own"
        assert type(LiteVAE.from_config(config)) is LiteVAE
        assert type(Own.from_config(json.loads(make().to_json_string()))) is Own


class TestFolders:
    def test_weights_that_do_not_cover_the_model_are_refused(self, make, tmp_path):
        make().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "use_1x1_conv": True}))
        with pytest.raises(
            ValueError, match=r"its weights lack post_quant_conv\.bias and 3 others of the model"
        ):
            LiteVAE.from_pretrained(tmp_path)

    def test_loading_info_as_in_diffusers(self, make, tmp_path):
        make().save_pretrained(tmp_path)
        model, info = LiteVAE.from_pretrained(tmp_path, output_loading_info=True)
        assert_same(model, make())
        assert info["missing_keys"] == []

    @pytest.mark.parametrize(
        "options", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.bfloat16}], ids=str
    )
    def test_weights_of_another_shape(self, make, tmp_path, options, caplog):
        make().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=", or pass ignore_mismatched_sizes=True") as caught:
            LiteVAE.from_pretrained(tmp_path, latent_channels=5, **options)
        text = str(caught.value)
        assert re.search(
            r"conv_out\.weight is \(8, 8, 3, 3\) in diffusion.* and \(10, 8, 3, 3\) in the model", text
        )
        assert "low_cpu_mem_usage" not in text
        caplog.clear()
        loaded = LiteVAE.from_pretrained(
            tmp_path, in_channels=4, latent_channels=5, ignore_mismatched_sizes=True, **options
        )
        assert {x.dtype for x in loaded.parameters()} == {options.get("torch_dtype", torch.float32)}
        own = make().state_dict()
        torch.manual_seed(3)
        fresh = LiteVAE.from_config(loaded.config).state_dict()
        names = {name for name in own if own[name].shape != fresh[name].shape}
        assert names
        assert all(name in caplog.text for name in names)
        for name, weight in loaded.state_dict().items():
            assert not weight.is_meta
            if name in names:  # drawn at random in the same range
                assert 0 < weight.float().std() < 2 * fresh[name].std()
            else:
                assert torch.equal(weight, own[name].to(weight.dtype))

    @pytest.mark.parametrize("form", ["bin", "parts"])
    def test_pickles_alone_are_loaded_without_a_word(self, make, tmp_path, form, capfd, caplog):
        make().save_pretrained(
            tmp_path, safe_serialization=False, max_shard_size="20KB" if form == "parts" else "10GB"
        )
        assert_same(LiteVAE.from_pretrained(tmp_path), make())
        assert_same(load_model(tmp_path), make())
        assert caplog.text == ""
        assert not re.sub(r".*Loading checkpoint shards.*", "", capfd.readouterr().err).strip()

    @pytest.mark.parametrize("kind", ["missing", "fifo", "device"])
    def test_weights_that_are_no_file_are_one_line(self, make, tmp_path, kind, capfd, caplog):
        make().save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        for load in (LiteVAE.from_pretrained, load_model):
            with pytest.raises((ValueError, OSError), match=r"o such file|not a regular file") as caught:
                load(tmp_path)
            assert "\n" not in str(caught.value)
        assert (capfd.readouterr().err, caplog.text) == ("", "")

    @pytest.mark.parametrize("subfolder", [None, "vae"])
    def test_a_variant_is_named(self, make, tmp_path, subfolder):
        make().save_pretrained(tmp_path / (subfolder or ""), variant="fp16")
        with pytest.raises(ValueError, match="holds only a variant of the weights: pass variant='fp16'"):
            LiteVAE.from_pretrained(tmp_path, subfolder=subfolder)
        assert_same(LiteVAE.from_pretrained(tmp_path, subfolder=subfolder, variant="fp16"), make())

    def test_two_scales_are_said(self, make, tmp_path):
        make(scaling_factor=0.5, latents_mean=[1.0] * 4, latents_std=[2.0] * 4).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="run `litevae scale` again"):
            loaded = LiteVAE.from_pretrained(tmp_path)
        assert loaded.config.latents_std == [2.0] * 4

    def test_auto_model_finds_the_class(self, make, tmp_path):
        make().save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path))
        assert type(loaded) is LiteVAE
        assert_same(loaded, make())


class TestSingleFile:
    @pytest.mark.parametrize("given", ["beside", "folder", "file", "mapping"])
    def test_loads_weights_with_a_configuration(self, make, tmp_path, given):
        make().save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        if given != "beside":
            path = path.rename(tmp_path.parent / f"{tmp_path.name}.safetensors")
        config = {
            "beside": None,
            "folder": tmp_path,
            "file": str(tmp_path / "config.json"),
            "mapping": make().config,
        }[given]
        loaded = LiteVAE.from_single_file(path, config=config)
        assert_same(loaded, make())
        assert not loaded.training
        assert (
            LiteVAE.from_single_file(path, config=config, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
        )

    def test_mistakes_are_one_line(self, make, autoencoder_kl, tmp_path):
        make().save_pretrained(tmp_path / "ours")
        autoencoder_kl.save_pretrained(tmp_path / "theirs")
        name = "diffusion_pytorch_model.safetensors"
        for path, config, message in (
            (
                tmp_path / "ours" / name,
                tmp_path / "nowhere",
                "its configuration is missing: .*nowhere: no such file",
            ),
            (tmp_path / "ours" / name, make(latent_channels=5).config, "has another architecture"),
            (
                tmp_path / "theirs" / name,
                make().config,
                "holds an AutoencoderKL: a LiteVAE takes its decoder with",
            ),
            (tmp_path / "theirs" / name, None, "holds an AutoencoderKL"),
            (tmp_path / "nothing.safetensors", None, r"nothing\.safetensors: no such file"),
            ("https://host/a.safetensors", None, "^https://host/a.safetensors: an address, not a local file"),
            (tmp_path / "ours" / name, "https://host/config.json", "https://host/config.json: an address"),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                LiteVAE.from_single_file(path, config=config)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_load_decoder_is_one_call(make, latent, autoencoder_kl, tmp_path, use_1x1_conv):
    autoencoder_kl.save_pretrained(tmp_path)
    model = make(use_1x1_conv=use_1x1_conv)
    model.load_decoder(str(tmp_path))
    with torch.no_grad():
        expected = autoencoder_kl.decode(latent).sample if use_1x1_conv else autoencoder_kl.decoder(latent)
        torch.testing.assert_close(model.decode(latent).sample, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^load_decoder: nowhere: no such file or folder$"):
        model.load_decoder("nowhere")


def test_a_configuration_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # opening it would block
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match=r"config\.json: not a regular file"):
        LiteVAE.from_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("load", [LiteVAE.from_pretrained, LiteVAE.from_config])
def test_an_address_is_not_taken_for_a_repository(load):
    with pytest.raises(
        ValueError, match=r"^https:/huggingface\.co/user/name: an address, not a local folder or"
    ):
        load("https://huggingface.co/user/name")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Returns a function that puts a folder into the Hub's cache, under a name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, folder: str) -> str:
        cached, commit = tmp_path / "hub" / f"models--me--{name}", "a" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(folder, cached / "snapshots" / commit)
        return f"me/{name}"

    return put


def test_a_repository_of_the_hub_names_what_does_not_fit_or_is_missing(make, repository, tmp_path):
    model, cache = make(), {"cache_dir": tmp_path / "hub"}
    model.save_pretrained(tmp_path / "model")
    assert_same(LiteVAE.from_pretrained(repository("good", tmp_path / "model"), **cache), model)

    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    width = content["extractor_channels"]
    file.write_text(json.dumps(content | {"extractor_channels": 2 * width}))
    with pytest.raises(
        ValueError,
        match=rf"^me/bad: \S+ is \({width}, .*\) in diff\S+ and \({2 * width}, .*: use the files of one model",
    ):
        LiteVAE.from_pretrained(repository("bad", tmp_path / "model"), **cache)

    (tmp_path / "model" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"^me/none: holds no config.json with \S+ or .bin .*subfolder='vae'$"):
        LiteVAE.from_pretrained(repository("none", tmp_path / "model"), **cache)
