import copy
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file
from torch import nn

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.models.weight_files import WEIGHTS, read_weights
from litevae.models.weights import (
    copy_weights,
    hash_encoder,
    load_decoder,
    load_weights,
    save_model,
    write_model,
    write_tensors,
)


@pytest.fixture
def other(make):
    """Returns a function that makes a tiny model with other weights than `make`'s."""

    def make_other(**options) -> LiteVAE:
        model = make(**options)
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model

    return make_other


def assert_same(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), atol=0, rtol=0)


class TestWriteModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_diffusers_and_safetensors_read_it(self, make, tmp_path, dtype):
        model = make(scaling_factor=0.5).to(dtype, memory_format=torch.channels_last)
        write_model(model, tmp_path / "model")
        assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", WEIGHTS}
        torch.testing.assert_close(
            load_file(tmp_path / "model" / WEIGHTS), dict(model.state_dict()), atol=0, rtol=0
        )
        loaded = LiteVAE.from_pretrained(tmp_path / "model", torch_dtype=dtype)
        assert_same(loaded, model)
        assert loaded.config.scaling_factor == 0.5

    def test_does_not_write_into_an_existing_folder(self, make, tmp_path):
        with pytest.raises(FileExistsError):
            write_model(make(), tmp_path)


class TestSaveModel:
    def test_replaces_the_old_model(self, make, other, tmp_path):
        for model in (make(), other()):
            save_model(model, tmp_path / "model")
            assert_same(LiteVAE.from_pretrained(tmp_path / "model"), model)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_failed_save_leaves_the_old_model(self, make, tmp_path, monkeypatch):
        def fail(_):
            raise OSError("disk full")

        save_model(make(), tmp_path / "model")
        before = (tmp_path / "model" / "config.json").read_text()
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(make(), tmp_path / "model")
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model" / "config.json").read_text() == before

    def test_the_old_model_survives_a_rename_that_fails(self, make, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        save_model(make(), folder)
        original = os.rename

        def rename(source, target):
            if str(source).endswith(".new"):
                raise OSError("disk")
            original(source, target)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="disk"):
            save_model(make(), folder)
        monkeypatch.undo()
        LiteVAE.from_pretrained(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_the_old_model_survives_a_kill_and_a_failing_save(self, make, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        save_model(make(), folder)
        # This is the state after a kill between the two renames.
        os.rename(folder, folder.with_name(".model.old"))

        def fail(_):
            raise OSError("full")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="full"):
            save_model(make(), folder)
        LiteVAE.from_pretrained(folder)


class TestLoadWeights:
    @pytest.fixture
    def folder(self, other, tmp_path):
        other().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_restores_all_of_them(self, make, other, folder):
        model = make()
        load_weights(model, folder, "init")
        assert_same(model, other())

    def test_other_settings_than_the_architecture_may_differ(self, make, other, folder):
        model = make(sample_size=64, scaling_factor=0.3, latents_mean=[0.0] * 4, force_upcast=True)
        load_weights(model, folder, "init")
        assert_same(model, other())
        assert model.config.scaling_factor == 0.3  # the configuration stays

    def test_settings_of_later_versions_have_their_defaults(self, make, other, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["extractor"], config["finest_level"]
        (folder / "config.json").write_text(json.dumps(config))
        model = make()
        load_weights(model, folder, "init")
        assert_same(model, other())
        with pytest.raises(UserError, match=r"init: .*model has another architecture"):
            load_weights(make(finest_level=2), folder, "init")

    @pytest.mark.parametrize(
        "options", [{"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=str
    )
    def test_every_form_that_diffusers_writes_is_read(self, make, other, tmp_path, options):
        other().save_pretrained(tmp_path, **options)
        model = make()
        load_weights(model, tmp_path, "init")
        assert_same(model, other())

    def test_another_architecture_is_named(self, make, folder):
        message = r"^init: .*model has another architecture: latent_channels is 4 there and 5 here$"
        with pytest.raises(UserError, match=message):
            load_weights(make(latent_channels=5), folder, "init")
        baseline = AutoencoderKL()
        with pytest.raises(UserError, match="_class_name is 'LiteVAE' there and 'AutoencoderKL' here"):
            load_weights(baseline, folder, "init")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.json", None, r"config\.json: cannot be read"),
            ("config.json", b"{", r"config\.json: cannot be read"),
            ("config.json", b"[]", r"config\.json: not a model's configuration"),
            (WEIGHTS, None, rf"{WEIGHTS}: no such file"),
            (WEIGHTS, b"{", rf"{WEIGHTS}: cannot be read"),
        ],
    )
    def test_damaged_files_are_one_line(self, make, folder, name, content, message):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"^resume: .*{message}") as caught:
            load_weights(make(), folder, "resume")
        assert "\n" not in str(caught.value)


class TestLoadDecoder:
    @pytest.fixture
    def vae(self):
        torch.manual_seed(2)
        return AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        )

    @pytest.mark.parametrize("pipeline", [False, True])
    @pytest.mark.parametrize("use_1x1_conv", [False, True])
    def test_decodes_as_the_autoencoder(self, make, latent, vae, tmp_path, use_1x1_conv, pipeline):
        vae.save_pretrained(tmp_path / "vae" if pipeline else tmp_path)
        model = make(use_1x1_conv=use_1x1_conv)
        encoder = copy.deepcopy(model.encoder)
        load_decoder(model, tmp_path)
        with torch.no_grad():
            oracle = vae.decode if use_1x1_conv else lambda z: vae.decoder(z)
            expected = oracle(latent)
            torch.testing.assert_close(
                model.decode(latent).sample, getattr(expected, "sample", expected), atol=1e-5, rtol=1e-5
            )
        assert_same(model.encoder, encoder)

    def test_a_file_without_a_decoder_is_refused(self, make, tmp_path):
        write_tensors(tmp_path / "unet.safetensors", {"conv_in.weight": torch.zeros(1)})
        with pytest.raises(
            UserError, match=r"init_decoder: .*unet\.safetensors: holds no decoder of an auto"
        ):
            load_decoder(make(), tmp_path / "unet.safetensors")

    def test_another_decoder_is_named(self, make, vae, tmp_path):
        vae.save_pretrained(tmp_path)
        with pytest.raises(
            UserError, match=r"init_decoder: .* decoder\.conv_in\.weight is \(16, 4, 3, 3\) there"
        ):
            load_decoder(make(latent_channels=5), tmp_path)
        decoder = {name: w for name, w in vae.state_dict().items() if name.startswith("decoder.")}
        save_file(decoder, tmp_path / "alone.safetensors")
        with pytest.raises(UserError, match=r"it lacks post_quant_conv\.bias$"):
            load_decoder(make(use_1x1_conv=True), tmp_path / "alone.safetensors")
        with pytest.raises(UserError, match=r"^init_decoder: nowhere: no such file or folder$"):
            load_decoder(make(), Path("nowhere"))


class TestCopyWeights:
    def test_differences_are_named(self, tmp_path):
        module, own = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
        copy_weights(module, own, tmp_path, "resume")
        assert torch.equal(module.weight, own["weight"])
        for weights, message in (
            ({"weight": own["weight"]}, "it lacks bias"),
            ({**own, "scale": own["bias"]}, "this model lacks its scale"),
            ({**own, "bias": torch.zeros(2)}, r"bias is \(2,\) there and \(3,\) here"),
        ):
            with pytest.raises(UserError, match=f"^resume: .* has another architecture: {message}"):
                copy_weights(module, weights, tmp_path, "resume")


def test_tensors_are_read_as_they_were_written(tmp_path):
    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "tensors.safetensors", tensors)
    torch.testing.assert_close(read_weights(tmp_path / "tensors.safetensors", "resume"), tensors)


class TestHashEncoder:
    def test_the_decoder_and_the_scale_do_not_matter(self, make, tmp_path):
        model, expected = make(), hash_encoder(make())
        for parameter in model.decoder.parameters():
            nn.init.normal_(parameter)
        model.register_to_config(scaling_factor=0.5, latents_std=[1.0] * 4, sample_size=64)
        assert hash_encoder(model) == expected
        model.save_pretrained(tmp_path)
        assert hash_encoder(LiteVAE.from_pretrained(tmp_path)) == expected
        assert hash_encoder(model.to(memory_format=torch.channels_last)) == expected

    def test_is_that_of_versions_without_a_range_of_values(self, make):
        model = make()
        expected = hash_encoder(model)
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "value_range"})
        assert hash_encoder(model) == expected

    def test_all_that_the_latents_depend_on_matters(self, make):
        models = [make(), make(use_1x1_conv=True), make(finest_level=2), make().bfloat16()]
        changed = make()
        changed.encoder.feature_aggregator.conv_out.bias.data[0] += 1e-3
        quantised = make(use_1x1_conv=True)
        quantised.quant_conv.weight.data[0] += 1e-3
        without_parameters = [
            make(encoder_type="dwt", latent_channels=12),
            make(encoder_type="dwt", latent_channels=12, block_out_channels=(8, 8, 16)),
            make(encoder_type="dwt", latent_channels=12, value_range=[0, 1]),
            make(encoder_type="dwt", latent_channels=12, value_range=[0, 2]),
        ]
        hashes = [hash_encoder(model) for model in (*models, changed, quantised, *without_parameters)]
        assert len(set(hashes)) == len(hashes)
