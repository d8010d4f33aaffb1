import json
import math
import os
from pathlib import Path

import pytest

from litevae.cli.common import (
    check_new_file,
    choose_workers,
    finite,
    make_folder,
    name_each,
    parse_metrics,
    provenance,
    results,
    stopped_message,
    write_json,
)
from litevae.cli.reconstruct import name_outputs
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.files import sha256


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("psnr", ["psnr"]),
        ("SSIM, psnr,,psnr", ["psnr", "ssim"]),
        ("fsim,ssim,rfid", ["rfid", "ssim", "fsim"]),
        ("", []),
    ],
)
def test_metrics_are_listed_once_and_in_order(text, names):
    assert parse_metrics(text) == names


def test_paths_are_named_by_the_user_or_by_their_last_parts():
    paths = [Path("runs/a"), Path("diffusers:models/b")]
    assert name_each(paths, None) == dict(zip(("a", "b"), paths, strict=True))
    assert name_each(paths, "SMC, Group") == dict(zip(("SMC", "Group"), paths, strict=True))
    same = [Path("one/model"), Path("two/model")]
    assert list(name_each(same, None)) == ["one/model", "two/model"]


@pytest.mark.parametrize("names", ["A", "A,A", "A,", "A,B,C"])
def test_names_must_be_as_many_as_paths_and_different(names):
    with pytest.raises(UserError, match="--names must be 2 different names"):
        name_each([Path("a"), Path("b")], names)


def test_existing_results_are_kept_unless_they_may_be_replaced(tmp_path):
    (tmp_path / "b.png").write_text("mine")
    with pytest.raises(UserError, match=r"b\.png already exists"):
        results(tmp_path, "a.json", "b.png", overwrite=False)
    assert results(tmp_path, "a.json", "b.png", overwrite=True) == [tmp_path / "a.json", tmp_path / "b.png"]
    assert results(tmp_path, "a.json", overwrite=False) == [tmp_path / "a.json"]


def test_a_file_needs_its_folder(tmp_path):
    check_new_file(tmp_path / "a.json", overwrite=False)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        check_new_file(tmp_path / "nowhere" / "a.json", overwrite=False)


def test_folders_that_cannot_be_made(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file" / "b")


def test_links_that_form_a_cycle_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert name_each([Path("loop"), Path("loop/x")], None) == {"loop": Path("loop"), "x": Path("loop/x")}
    for source in ("loop", "loop/x", "*"):
        with pytest.raises(UserError, match=r"loop.*: Too many levels of symbolic links"):
            open_images(source)
    Path("a.png").touch()
    assert name_outputs([Path("a.png")], Path("loop")) == [Path("loop/a.png")]


def test_json_has_no_infinity(tmp_path):
    assert (finite(1.5), finite(math.inf), finite(math.nan)) == (1.5, None, None)
    write_json({"psnr": finite(math.inf)}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"psnr": None}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_result_names_the_weights_that_were_measured(tiny_folder):
    address = provenance(tiny_folder, "https://user:pass@host/x.tar?signature", 64, pixels="RGB")["data"]
    assert address == "https://host/x.tar"
    record = provenance(tiny_folder, "demo", 64, 128, pixels="RGB of 8 bits")
    weights = tiny_folder / "diffusion_pytorch_model.safetensors"
    assert record["weights"] == {weights.name: sha256(weights)}
    assert (record["model"], record["data"]) == (str(tiny_folder), "demo")
    assert "resized to 64 x 64 and 128 x 128" in record["crop"]
    assert set(record["versions"]) == {"litevae", "diffusers", "torchvision", "torchmetrics"}


def test_a_stopped_run_says_whether_it_can_be_resumed():
    assert stopped_message("SIGINT", 1, True) == (
        "stopped by SIGINT after 1 step; everything is saved: continue with resume=auto"
    )
    assert stopped_message("SIGINT", 7, False).endswith("so the run cannot be resumed")


@pytest.mark.parametrize(("cores", "processes", "expected"), [(4, 1, 4), (64, 1, 16), (8, 4, 2), (2, 4, 1)])
def test_workers_share_the_cores(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_workers(None) == expected
    assert choose_workers(0) == 0
