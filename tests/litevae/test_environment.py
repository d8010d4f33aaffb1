import os
import shutil
import subprocess

import pytest
import torch

import litevae.environment
from litevae.environment import device_name, versions


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
