from urllib.error import URLError

import pytest
import torch

import litevae.evaluation.fid as fid_module
from litevae.errors import UserError
from litevae.evaluation.fid import make_fid
from litevae.files import sha256


class TestInceptionWeights:
    NAME = "weights-inception-2015-12-05-6726825d.pth"

    @pytest.fixture(autouse=True)
    def hub(self, tmp_path, monkeypatch):
        def no_connection(*_, **__):
            raise URLError("no route to host")

        monkeypatch.setattr(torch.hub, "urlopen", no_connection)
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
        return tmp_path / "checkpoints"

    def test_missing(self, hub):
        with pytest.raises(
            UserError, match=r"cannot be downloaded .*: put https://.*6726825d\.pth there"
        ) as e:
            make_fid(None)
        assert str(hub) in str(e.value)
        assert "\n" not in str(e.value)

    def test_another_file(self, hub):
        hub.mkdir()
        (hub / self.NAME).write_bytes(b"something")
        with pytest.raises(UserError, match="is not torch-fidelity's Inception, or damaged"):
            make_fid(None)

    def test_file_that_is_there_is_used(self, hub, monkeypatch):
        """The file is checked before it is unpickled."""
        from torchmetrics.image.fid import NoTrainInceptionV3

        hub.mkdir()
        torch.manual_seed(0)
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled before it was checked"))
        (hub / self.NAME).write_bytes(b"0")
        with pytest.raises(UserError):
            make_fid(None)
        monkeypatch.undo()
        monkeypatch.setattr(torch.hub, "_hub_dir", str(hub.parent))
        monkeypatch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.save({}, hub / self.NAME)
        monkeypatch.setattr(
            fid_module, "INCEPTION", self.rename(hub / self.NAME, sha256(hub / self.NAME)[:8])
        )
        fid = make_fid(None)
        assert fid.inception(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2048)
        assert not fid.inception.use_antialias

    @staticmethod
    def rename(path, digest):
        return f"https://example.org/{path.rename(path.with_name(f'inception-{digest}.pth')).name}"
