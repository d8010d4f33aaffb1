"""Generated manifests of checkpoints."""

import hashlib
import json

import pytest

from litevae.training.checkpoint import choose_checkpoint, load_state


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "long"])
def test_any_manifest(explore, ends_well, broken_json, tmp_path, long):
    folder = tmp_path / "checkpoints"
    manifest = folder / "step-00000003" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    files = {"state.pt": b"state", "model/config.json": b"{}"}
    (manifest.parent / "model").mkdir()
    for name, content in files.items():
        (manifest.parent / name).write_bytes(content)
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    document = {"step": 3, "psnr": 12.5, "versions": "", "config": {"seed": 0}, "files": listed}

    def resume():
        checkpoint = choose_checkpoint(str(manifest.parent), tmp_path / "other")
        if checkpoint is not None:
            load_state(checkpoint)

    def check(content):
        manifest.write_bytes(content)
        assert ends_well(resume) is not None  # at the latest, its state.pt is none
        manifest.write_bytes(content)
        ends_well(choose_checkpoint, "auto", folder)

    manifest.write_text(json.dumps(document))
    assert "state.pt: cannot be read" in ends_well(resume)
    explore(broken_json(document), check, 80, long)
