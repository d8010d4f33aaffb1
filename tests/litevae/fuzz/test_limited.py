"""The files that once took all memory or hung, in a process of little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from litevae import LiteVAE

SECONDS = 60  # of a clock, because other processes may be busy


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_take_neither_time_nor_memory(tmp_path):
    LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16), layers_per_block=1, num_groups=4
    ).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name, changes in {
        "multipliers": {"extractor_multipliers": [1] * 9000},
        "widths": {"block_out_channels": [16] * 9000},
        "wide": {"block_out_channels": [10**6, 10**6]},
        "layers": {"layers_per_block": 10**6},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
    os.mkfifo(tmp_path / "fifo.tar")
    os.mkfifo(tmp_path / "fifo.yaml")
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    files = {"/dev/zero": {"bytes": 0, "sha256": "0" * 64}}
    content = {"step": 1, "psnr": None, "config": {}, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    aliases = "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9))
    (tmp_path / "aliases.yaml").write_text(f"a0: &a0 [1]\n{aliases}")
    train = ["train", "demo", "output_dir=out", "tracker=none", "max_steps=1", "checkpoint.every=1"]
    commands = {
        **{name: ["info", name, "--size", "32"] for name in ("multipliers", "widths", "wide", "layers")},
        "weights": ["info", "litevae-b,block_out_channels=[60000,60000,60000,60000]"],
        "batch": [*train, "data.batch_size=100000"],
        "checkpoint": [*train, "resume=step-00000001"],
        "names": [*train, "data.train=x-{000..999999999}.tar"],
        "fifo": [*train, "data.train=fifo.tar"],
        "yaml": ["config", "fifo.yaml"],
        "aliases": ["config", "aliases.yaml"],
    }
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("limited.py"), *map(json.dumps, commands.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    results = dict(zip(commands, map(json.loads, run.stdout.splitlines()), strict=False))
    assert results.keys() == commands.keys(), run.stderr
    for name, (status, errors, seconds) in results.items():
        assert status == 2, (name, errors)
        assert errors.splitlines()[-1].startswith("litevae: error: "), (name, errors)
        assert len(errors.splitlines()[-1]) < 450, (name, errors)
        assert seconds < SECONDS, name
    assert "of memory needed" in results["weights"][1]
    assert "data.batch_size: 100000 of " in results["batch"][1]
