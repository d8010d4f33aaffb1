import shutil

import pytest
import torch

from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.latents.shard_encoder import Times, combine_times


class TestUnfinishedShard:
    @pytest.fixture
    def file(self, encode, photographs, tmp_path, interrupting):
        """Stops a run after the first half of the second shard, in which an image is bad; returns the file kept."""
        encode(images=interrupting(open_images(str(photographs)), 5))
        return tmp_path / "latents" / ".shard-00001.unfinished"

    def test_is_gone_on_with(self, file, encode, photographs, tmp_path, contents, eventful):
        loaded = []
        encode(images=eventful(open_images(str(photographs)), loaded.append))
        assert loaded == [6, 7, 8, 9, 10]
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_is_stopped_twice(self, file, encode, photographs, tmp_path, contents, interrupting):
        encode("whole", shard_size=11)
        for at in (2, 7):
            encode("twice", shard_size=11, images=interrupting(open_images(str(photographs)), at))
        encode("twice", shard_size=11)
        assert contents(tmp_path / "twice") == contents(tmp_path / "whole")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-1],
            lambda content: b"",
            lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
        ],
    )
    def test_damage_is_found(self, file, encode, tmp_path, contents, capsys, damage):
        file.write_bytes(damage(file.read_bytes()))
        assert encode().before == 4
        assert (
            f"{file}: its content is not what was written (SHA-256); its images are encoded again"
            in capsys.readouterr().err
        )
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_anothers_is_not_used(
        self, file, encode, model_folder, photographs, tmp_path, contents, capsys, interrupting
    ):
        model = LiteVAE.from_pretrained(model_folder)
        with torch.no_grad():
            model.encoder.feature_aggregator.conv_in.weight[0, 0, 0, 0] += 1e-3
        encode("other", model=model, images=interrupting(open_images(str(photographs)), 5))
        shutil.copy(tmp_path / "other" / file.name, file)
        assert encode().before == 4
        assert "was left by a run with another --batch-size, or of something else" in capsys.readouterr().err
        encode("whole")
        assert contents(tmp_path / "latents") == contents(tmp_path / "whole")

    def test_of_other_batches_is_not_used(self, file, encode, tmp_path, contents, capsys):
        shutil.copytree(tmp_path / "latents", tmp_path / "again")
        (tmp_path / "again" / file.name).unlink()
        encode(batch_size=3)
        assert "another --batch-size" in capsys.readouterr().err
        encode("again", batch_size=3)
        assert contents(tmp_path / "latents") == contents(tmp_path / "again")


def test_what_is_not_finite_is_named(encode, model, tmp_path):
    with torch.no_grad():
        model.encoder.feature_aggregator.conv_out.bias[0] = 1e5
    with pytest.raises(UserError, match=r"a/00\.png: its latent is not finite, or beyond float16's 65504$"):
        encode()
    with pytest.raises(UserError, match="65504: try --precision fp32"):
        encode("bf16", precision="bf16")
    assert not list(tmp_path.glob("*/shard*"))


def test_processes_without_images_do_not_count_in_the_times():
    idle = Times(0.0, 0.0, 0.0, 0.0)
    assert combine_times([Times(4.0, 3.0, 1.0, 0.0), idle, Times(2.0, 1.0, 0.5, 0.5)]) == (4, 2, 0.75, 0.25)
    assert combine_times([idle] * 2) == idle
