"""Models on the Hub, a server on this machine: uploads with their cards, and downloads in every form."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import ModelCard

from litevae import LiteVAE
from litevae.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(model_folder):
    return LiteVAE.from_pretrained(model_folder)


def assert_same(model, other):
    theirs = other.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())


class TestPushToHub:
    def test_uploads_the_model_and_its_card(self, hub, model):
        model.card.data.license = "apache-2.0"
        model.push_to_hub("me/vae", private=True)
        files = hub.repositories["me/vae"]
        assert set(files) == {"config.json", WEIGHTS, "README.md"}
        assert hub.private["me/vae"]
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "apache-2.0"
        assert 'LiteVAE.from_pretrained("me/vae")' in card.text
        assert_same(model, LiteVAE.from_pretrained("me/vae"))

    @pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
    def test_a_card_on_the_hub_stays(self, hub, model, tmp_path, way):
        hub.repositories["me/vae"] = {"README.md": b"---\nlicense: mit\n---\nMine.\n"}
        if way == "push_to_hub":
            model.push_to_hub("me/vae")
        else:
            model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/vae")
        card = ModelCard(hub.repositories["me/vae"]["README.md"].decode())
        assert (card.data.license, card.text.strip()) == ("mit", "Mine.")

    def test_save_pretrained_pushes_the_same_card(self, hub, model, tmp_path):
        model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/vae")
        model.push_to_hub("me/other")
        cards = [hub.repositories[name]["README.md"].decode() for name in ("me/vae", "me/other")]
        assert cards[0].replace("me/vae", "me/other") == cards[1]


class TestFromPretrained:
    def test_a_variant_in_parts_in_a_subfolder(self, hub, model, tmp_path):
        half = model.to(torch.float16)
        half.save_pretrained(tmp_path / "repository" / "vae", variant="fp16", max_shard_size="1MB")
        names = {path.name for path in (tmp_path / "repository" / "vae").iterdir()}
        assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
        hub.add("me/pipeline", tmp_path / "repository")
        options = {"subfolder": "vae", "variant": "fp16"}
        loaded = LiteVAE.from_pretrained("me/pipeline", torch_dtype=torch.float16, **options)
        assert loaded.dtype == torch.float16
        assert_same(half, loaded)
        loaded = LiteVAE.from_pretrained("me/pipeline", **options)
        assert loaded.dtype == torch.float32
        assert_same(half.float(), loaded)
        before = len(hub.paths)
        LiteVAE.from_pretrained("me/pipeline", **options, local_files_only=True)  # from the cache
        assert len(hub.paths) == before

    def test_a_variant_alone_is_named(self, hub, model, tmp_path):
        model.save_pretrained(tmp_path / "repository", variant="fp16")
        hub.add("me/vae", tmp_path / "repository")
        with pytest.raises(
            UserError, match=r"^me/vae: holds only a variant of the weights: pass variant='fp16'$"
        ):
            LiteVAE.from_pretrained("me/vae")
        with pytest.raises(UserError, match=r"^me/vae: holds no weights of variant 'bf16', only fp16$"):
            LiteVAE.from_pretrained("me/vae", variant="bf16")

    def test_another_class_is_refused_before_its_weights_are_loaded(self, hub, tmp_path):
        torch.manual_seed(0)
        AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "repository")
        hub.add("me/kl", tmp_path / "repository")
        with pytest.raises(UserError, match=r"^me/kl: the configuration is that of AutoencoderKL"):
            LiteVAE.from_pretrained("me/kl")
        assert not any(path.endswith(WEIGHTS) for path in hub.paths)

    def test_a_repository_that_does_not_exist(self, hub):
        with pytest.raises(OSError, match="me/nothing is not a local folder"):
            LiteVAE.from_pretrained("me/nothing")

    def test_a_repository_without_a_model(self, hub, tmp_path):
        (tmp_path / "README.md").touch()
        hub.add("me/text", tmp_path)
        with pytest.raises(OSError, match=r"^me/text: holds no config\.json with .* subfolder='vae'$"):
            LiteVAE.from_pretrained("me/text")

    def test_a_pipeline_loads_after_importing_litevae(self, hub, model, tmp_path):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8
        )
        pipe = DiTPipeline(transformer, model, DDIMScheduler())
        pipe.save_pretrained(tmp_path / "pipeline")
        hub.add("me/pipeline", tmp_path / "pipeline")
        for source in (tmp_path / "pipeline", "me/pipeline"):
            loaded = DiffusionPipeline.from_pretrained(source)
            assert type(loaded.vae) is LiteVAE
            assert_same(model, loaded.vae)
