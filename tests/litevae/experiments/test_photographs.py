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
    for split, name, size in (("train", "wallpapers", (800, 600)), ("held-out", "backgrounds", (220, 200))):
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


def test_photographs_are_reduced_and_keep_their_split(packages, tmp_path, capsys):
    folder = tmp_path / "out" / "photographs"
    assert main([str(folder)]) == 0
    names = {
        split: sorted(file.name for file in (folder / split).iterdir()) for split in ("train", "held-out")
    }
    assert names == {
        "train": ["scikit-image-astronaut.png", "scikit-image-coffee.png", "wallpapers-nature.png"],
        "held-out": ["backgrounds-nature.png", "scikit-image-chelsea.png"],
    }
    printed = capsys.readouterr().out
    assert "3 photographs in" in printed
    assert "2 photographs in" in printed
    # 800 x 600 pixels are reduced to 341 x 256; a small photograph is not enlarged.
    reduced = Image.open(packages[0].folder / "nature/leaf.png").resize((341, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(read_image(folder / "train/wallpapers-nature.png"), np.asarray(reduced))
    small = packages[1].folder / "nature/leaf.png"
    assert np.array_equal(read_image(folder / "held-out/backgrounds-nature.png"), read_image(small))
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
