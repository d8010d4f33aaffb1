import numpy as np
import pytest
from PIL import Image

from litevae.data.images import read_image
from litevae.experiments import photographs
from litevae.experiments.photographs import Collection, main


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages with one photograph each, and small photographs in scikit-image's place."""
    monkeypatch.setattr(
        photographs, "load_photograph", lambda name: np.full((256, 300, 3), len(name), np.uint8)
    )
    monkeypatch.setattr(photographs, "TRAINING_PHOTOGRAPHS", ("astronaut", "coffee"))
    sources = []
    for split, name, size in (("train", "wallpapers", (800, 600)), ("held-out", "backgrounds", (520, 300))):
        folder = tmp_path / "packages" / name
        (folder / "nature").mkdir(parents=True)
        random = np.random.default_rng(len(name))
        pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / "nature/leaf.png")
        sources.append(
            Collection(name, split, folder, ("nature/leaf.png",), f"apt-get install {name}", "GPL-2")
        )
    monkeypatch.setattr(photographs, "collections", lambda: tuple(sources))
    return sources


def test_photographs_become_disjoint_squares_of_two_splits(packages, tmp_path, capsys):
    folder = tmp_path / "out" / "photographs"
    assert main([str(folder)]) == 0
    names = {
        split: sorted(file.name for file in (folder / split).iterdir()) for split in ("train", "held-out")
    }
    assert len(names["train"]) == 2 * 2 + 2
    assert len(names["held-out"]) == 2 + 1
    printed = capsys.readouterr().out
    assert "6 squares in" in printed
    assert "3 squares in" in printed
    # 800 x 600 pixels are reduced to 683 x 512; the other photograph is small enough.
    pixels = Image.open(packages[0].folder / "nature/leaf.png").resize((683, 512), Image.Resampling.BICUBIC)
    squares = [
        read_image(folder / "train" / name) for name in names["train"] if name.startswith("wallpapers")
    ]
    rows = [np.concatenate(squares[i : i + 2], axis=1) for i in (0, 2)]
    assert np.array_equal(np.concatenate(rows), np.asarray(pixels)[:512, :512])
    whole = read_image(packages[1].folder / "nature/leaf.png")
    small = [read_image(folder / "held-out" / name) for name in names["held-out"] if name.startswith("back")]
    assert np.array_equal(np.concatenate(small, axis=1), whole[:256, :512])
    text = (folder / "LICENCES.txt").read_text(encoding="utf-8")
    assert all(f"{name}: " in text for name in ("wallpapers", "backgrounds", "scikit-image"))


def test_a_missing_package_is_named_with_its_command_and_nothing_is_written(packages, tmp_path, capsys):
    (packages[1].folder / "nature/leaf.png").unlink()
    folder = tmp_path / "photographs"
    assert main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leaf.png is missing" in line
    assert "apt-get install backgrounds" in line
    assert not folder.exists()


def test_an_existing_folder_is_not_replaced(packages, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine").is_file()


def test_the_shipped_collections_name_packages_and_how_to_install_them():
    sources = photographs.collections()
    assert {source.split for source in sources} == {"train", "held-out"}
    for source in sources:
        assert source.name in source.install
        assert source.files
        assert source.licence
        assert len(set(source.files)) == len(source.files)
    files = [len(source.files) for source in sources if source.install.startswith("sudo apt-get install")]
    assert sum(files) == 23
