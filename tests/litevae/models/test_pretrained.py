import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel

from litevae import LiteVAE


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
            (tmp_path / "ours" / name, tmp_path / "nowhere", "nowhere cannot be read"),
            (tmp_path / "ours" / name, make(latent_channels=5).config, "has another architecture"),
            (
                tmp_path / "theirs" / name,
                make().config,
                "holds an AutoencoderKL: a LiteVAE takes its decoder with",
            ),
            (tmp_path / "theirs" / name, None, "holds an AutoencoderKL"),
            (tmp_path / "nothing.safetensors", make().config, "no such file"),
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
    with pytest.raises(ValueError, match=r"load_decoder: nowhere/.*: no such file"):
        model.load_decoder("nowhere")


def test_a_configuration_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # opening it would block
    with pytest.raises(ValueError, match="not a regular file"):
        LiteVAE.from_single_file(tmp_path / "x.safetensors")
