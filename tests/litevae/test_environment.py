import os
import shutil
import subprocess

import pytest
import torch

import litevae.environment
from litevae.environment import choose_precision, device_name, versions
from litevae_kernels import arithmetic


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)

    def git(folder, *arguments):
        settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *settings, "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    root = tmp_path / "lib" / "site-packages"  # lies within another repository
    (root / "litevae").mkdir(parents=True)
    monkeypatch.setattr(litevae.environment, "__file__", str(root / "litevae" / "environment.py"))
    git(tmp_path, "init", "-q")
    assert "commit" not in versions.__wrapped__()
    git(root, "init", "-q")
    (root / "file").touch()
    git(root, "add", "file")
    git(root, "commit", "-q", "-m", "x")
    commit = git(root, "rev-parse", "HEAD")
    assert f"(commit {commit}), torch {torch.__version__}" in versions.__wrapped__()
    (root / "file").write_text("changed")
    assert f"(commit {commit}-dirty), torch" in versions.__wrapped__()


def test_versions_are_litevaes_and_torchs():
    assert versions().startswith("litevae ")
    assert versions().endswith(f"torch {torch.__version__}")


def test_cpu_is_named_with_its_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for count, ending in ((1, ", 1 thread"), (3, ", 3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert device_name().endswith(ending)
        assert device_name() != ending


def test_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert device_name() == "a GPU"


@pytest.mark.parametrize(
    ("precisions", "expected"),
    [(["bf16"], "bf16"), (["fp16"], "fp32"), (["fp16", "bf16"], "bf16"), ([], "fp32")],
)
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it(cpu_multiplies, precisions, expected):
    cpu_multiplies(*precisions)
    assert choose_precision("auto", torch.device("cpu")) == expected


def test_a_lowered_instruction_set_stands_for_a_cpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(arithmetic, "_X86", True)
    monkeypatch.setattr(arithmetic, "_BFLOAT16", True)
    for isa, expected in (("avx512bf16", "bf16"), ("avx512", "fp32"), ("avx2", "fp32")):
        monkeypatch.setattr(arithmetic, "current_isa", lambda isa=isa: isa)
        assert choose_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 1), "bf16")])
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda:1")) == expected
    assert choose_precision("auto", torch.device("cuda:1"), has_range=True) == "fp32"
    assert choose_precision("bf16", torch.device("cuda:1"), has_range=True) == "bf16"
    assert choose_precision("auto", torch.device("meta")) == "fp32"


def test_half_precision_that_a_cpu_emulates_is_named_once(cpu_multiplies, capsys):
    litevae.environment._warn_emulated.cache_clear()
    cpu_multiplies("bf16")
    assert [choose_precision(name, torch.device("cpu")) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert choose_precision("fp16", torch.device("cpu")) == "fp16"
    cpu_multiplies()
    for _ in range(2):
        assert choose_precision("bf16", torch.device("cpu")) == "bf16"
        assert choose_precision("auto", torch.device("cpu")) == "fp32"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("precision fp16: this CPU has no float16 arithmetic. ")
    assert second.startswith("precision bf16: this CPU has no bfloat16 arithmetic. ")


def test_tests_that_are_not_marked_see_no_gpu(hidden_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    with hidden_gpus():
        assert not torch.cuda.is_available()
        assert not torch.accelerator.is_available()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.is_available()
    assert torch.accelerator.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
