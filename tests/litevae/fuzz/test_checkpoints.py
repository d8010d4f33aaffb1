"""Generated manifests of checkpoints."""

import hashlib
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from litevae.training.checkpoint import choose_checkpoint, load_state
from litevae.training.config import Config
from litevae.training.start import choose_run_precision
from litevae.training.trainer import Trainer


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
    small = {"step": 3, "psnr": 12.5, "versions": "", "config": {"precision": "fp32"}, "files": listed}
    whole = small | {"config": asdict(Config(precision="bf16"))}
    loop = SimpleNamespace(loop_config=Config(), decisive_settings=Trainer.decisive_settings, is_main=True)

    def resume():
        checkpoint = choose_checkpoint(str(manifest.parent), tmp_path / "other")
        choose_run_precision("auto", checkpoint, torch.device("cpu"))
        Trainer.warn_of_changes(loop, checkpoint)
        load_state(checkpoint)

    def check(content):
        manifest.write_bytes(content)
        assert ends_well(resume) is not None  # at the latest, its state.pt is none
        manifest.write_bytes(content)
        ends_well(choose_checkpoint, "auto", folder)

    for document in (small, whole):
        manifest.write_text(json.dumps(document))
        assert "state.pt: cannot be read" in ends_well(resume)
    sections = st.sampled_from(sorted(whole["config"])).flatmap(
        lambda name: broken_json({**small, "config": {name: whole["config"][name]}})
    )
    explore(st.one_of(broken_json(small), broken_json(whole), sections), check, 80, long)
