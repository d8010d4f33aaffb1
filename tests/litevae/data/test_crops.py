from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from litevae.cli import main
from litevae.data.bad_images import BadImages
from litevae.data.config import DataConfig
from litevae.data.crops import CropBatch, CropItem, TrainingCrops, collate, random_resized_window
from litevae.data.sources import open_images
from litevae.data.squares import load_validation
from litevae.errors import UserError
from litevae.training.config import load_config

CHELSEA = data.chelsea()


def levels(crops, indices):
    return [crops[i].crop[0, 0, 0].item() for i in indices]


def where(rows=20, columns=30):
    """Makes an image whose pixels hold their own coordinates."""
    row, column = np.mgrid[:rows, :columns].astype(np.uint8)
    return np.stack([row, column, row], axis=2)


CONFIG = DataConfig(size=8)


def test_demo_crops_are_windows_of_photographs_drawn_anew():
    # The demo's published figures depend on these random numbers and their order.
    photographs, crops = (
        open_images("demo"),
        TrainingCrops(open_images("demo"), load_config("demo").data, 7, 30),
    )
    for i in range(30):
        random = np.random.default_rng((7, i))
        pixels = photographs.load(random.integers(8))
        top, left = random.integers(pixels.shape[0] - 63), random.integers(pixels.shape[1] - 63)
        window = pixels[top : top + 64, left : left + 64, :]
        expected = window[:, ::-1] if random.integers(2) else window
        np.testing.assert_array_equal(crops[i].crop.permute(1, 2, 0), expected)


def test_demo_crop_larger_than_a_photograph_is_refused():
    with pytest.raises(UserError, match="crops of 600 pixels do not fit photographs of 400 pixels"):
        TrainingCrops(open_images("demo"), DataConfig(size=600, crop="native"), seed=0, length=1)


@pytest.mark.parametrize("crop", ["random", "random_resized", "native"])
def test_item_depends_on_seed_and_index_alone(crop, given_images):
    images = given_images(*(CHELSEA[i : i + 100, i : i + 150] for i in range(7)), None)
    config = replace(CONFIG, crop=crop, max_bad_fraction=0.5)
    first, second = (TrainingCrops(images, config, 3, length) for length in (50, 99))
    again = {i: second[i] for i in torch.randperm(50).tolist()}
    for i in range(50):
        assert torch.equal(first[i].crop, again[i].crop)
        assert first[i].bad == again[i].bad
    assert len({first[i].crop.numpy().tobytes() for i in range(50)}) == 50
    other = TrainingCrops(images, config, 4, 50)
    assert not any(torch.equal(first[i].crop, other[i].crop) for i in range(50))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_share_the_same_items(tmp_path, workers):
    for i in range(5):
        Image.fromarray(CHELSEA[i : i + 40, : 30 + i]).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    crops = TrainingCrops(open_images(str(tmp_path)), replace(CONFIG, max_bad_fraction=0.5), 0, 14)
    batches = list(DataLoader(crops, 4, num_workers=workers, collate_fn=collate))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 2]
    expected = torch.stack([crops[i].crop for i in range(14)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    bad = (str(tmp_path / "5.png"), "not an image, or of an unsupported format")
    assert {entry for batch in batches for entry in batch.bad} == {bad}


def test_every_epoch_has_each_image_once_in_a_new_order(plain_images):
    crops = TrainingCrops(plain_images(*range(50)), CONFIG, seed=0, length=200)
    epochs = [tuple(levels(crops, range(start, start + 50))) for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert list(range(50)) not in map(list, epochs)


def test_collate_keeps_the_reports_apart_from_the_images():
    items = [CropItem(torch.full((3, 8, 8), i, dtype=torch.uint8), [("x", "why")] * i) for i in range(3)]
    batch = collate(items)
    assert isinstance(batch, CropBatch)
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.bad == [("x", "why")] * 3


def test_native_crops_are_windows_half_of_them_mirrored(given_images):
    crops = TrainingCrops(given_images(where()), replace(CONFIG, crop="native"), 0, 200)
    steps, corners = [], set()
    for crop in (crops[i].crop.int() for i in range(200)):
        assert crop.shape == (3, 8, 8)
        assert (crop[0].diff(dim=0) == 1).all()
        steps += crop[1].diff(dim=1).unique().tolist()
        corners.add((crop[0].min().item(), crop[1].min().item()))
    assert 60 < steps.count(-1) < 140
    assert steps.count(1) == 200 - steps.count(-1)
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 12, 0, 22)


def test_random_crop_is_a_square_of_the_shorter_side_resized(given_images):
    image = CHELSEA[:60, :90]
    crops = TrainingCrops(given_images(image), replace(CONFIG, size=20, flip=False), 0, 100)
    resized = {}
    for left in range(31):
        square = Image.fromarray(image[:, left : left + 60])
        expected = functional.resize(square, [20, 20], InterpolationMode.BICUBIC)
        resized[np.asarray(expected).transpose(2, 0, 1).tobytes()] = left
    found = {resized[crops[i].crop.numpy().tobytes()] for i in range(100)}
    assert min(found) < 5
    assert max(found) > 25


def test_without_flip_nothing_is_mirrored(given_images):
    crops = TrainingCrops(given_images(where()), replace(CONFIG, crop="native", flip=False), 0, 50)
    assert all((crops[i].crop[1].int().diff(dim=1) == 1).all() for i in range(50))


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (7, 5)])
def test_resized_windows_are_distributed_as_torchvisions(size):
    """The means of position and size over 4000 draws lie within 5 standard errors of torchvision's."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    blank = torch.zeros(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.array([random_resized_window(*size, random) for _ in range(4000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 4000)
    assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()


@pytest.mark.parametrize("crop", ["random", "random_resized"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1), (2, 3), (7, 700)])
def test_thin_and_small_images_are_enlarged(crop, size, given_images):
    pixels = np.full((*size, 3), 9, np.uint8)
    crops = TrainingCrops(given_images(pixels), replace(CONFIG, crop=crop, size=64), 0, 20)
    for i in range(20):
        assert (crops[i].crop == 9).all()
        assert crops[i].crop.shape == (3, 64, 64)
    ((_, square),) = load_validation(given_images(pixels), 64, 1).images
    assert (square == 9).all()


def test_bad_image_is_replaced_and_reported(plain_images):
    images = plain_images(*[None if i % 4 == 1 else i for i in range(40)])
    crops = TrainingCrops(images, replace(CONFIG, max_bad_fraction=0.3), 0, 40)
    reported = []
    for i in range(40):
        level = crops[i].crop[0, 0, 0].item()
        assert level % 4 != 1
        reported += crops[i].bad
    assert set(reported) == {(f"image {i}", f"reason {i}") for i in range(1, 40, 4)}


def test_replacements_are_not_always_the_same(plain_images):
    images = plain_images(None, *range(1, 100))
    crops = TrainingCrops(images, CONFIG, 0, 3000)
    replacements = [item.crop[0, 0, 0].item() for item in (crops[i] for i in range(3000)) if item.bad]
    assert len(replacements) >= 30  # at least once per epoch
    assert len(set(replacements)) > 15


def test_native_crop_larger_than_an_image_is_a_bad_image(given_images):
    images = given_images(CHELSEA[:7, :30], CHELSEA[:20, :30])
    item = TrainingCrops(images, replace(CONFIG, crop="native", max_bad_fraction=0.5), 0, 2)
    reports = {report for i in range(2) for report in item[i].bad}
    assert reports == {("image 0", "30x7 pixels, smaller than a crop of 8")}


@pytest.mark.parametrize(("count", "fraction"), [(1, 0), (3, 0.99), (300, 0.01), (100, 0.29)])
def test_only_bad_images_stop_the_run(tmp_path, count, fraction, plain_images):
    item = TrainingCrops(plain_images(*[None] * count), replace(CONFIG, max_bad_fraction=fraction), 0, 1)[0]
    assert item.crop.shape == (3, 8, 8)
    with pytest.raises(UserError, match=f"of {count} images cannot be used"):
        BadImages(tmp_path / "bad_images.txt", count, fraction).add(item.bad)


def write_hard_folder(folder):
    """Writes images of unusual kinds, and two files that are not images."""
    image = Image.fromarray(CHELSEA[:90, :80])
    for mode, name in {
        "L": "png",
        "1": "png",
        "P": "gif",
        "CMYK": "jpg",
        "LA": "png",
        "RGBA": "webp",
    }.items():
        image.convert(mode).save(folder / f"{mode}.{name}")
    Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80) * 10).save(folder / "16.png")
    (folder / "text.jpg").write_text("text")
    (folder / "cut.jpg").write_bytes((folder / "CMYK.jpg").read_bytes()[:900])


def test_command_trains_on_a_folder_of_unusual_images(tmp_path, monkeypatch, capsys):
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    write_hard_folder(images)
    settings = ["max_steps=5", "data.size=16", "data.crop=random", "data.workers=1", f"output_dir={run}"]
    command = ["train", "demo", f"data.train={images}", *settings]
    assert main([*command, "data.max_bad_fraction=0.3"]) == 0
    listed = {line.split("\t")[0] for line in (run / "bad_images.txt").read_text().splitlines()}
    assert listed == {str(images / "text.jpg"), str(images / "cut.jpg")}
    capsys.readouterr()
    assert main([*command, "data.max_bad_fraction=0.1", f"output_dir={tmp_path / 'again'}"]) != 0
    error = capsys.readouterr().err
    assert "2 of 9 images cannot be used, more than data.max_bad_fraction=0.1 allows" in error
    assert "Traceback" not in error


def test_grey_folder_gives_grey_crops(tmp_path):
    Image.fromarray(CHELSEA).convert("L").save(tmp_path / "grey.jpg")
    crop = TrainingCrops(open_images(str(tmp_path)), CONFIG, 0, 1)[0].crop
    assert torch.equal(crop[0], crop[1])
    assert torch.equal(crop[0], crop[2])
    assert crop.float().std() > 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.max_bad_fraction=1", "data.max_bad_fraction must be below 1, got 1"),
        ("data.max_bad_fraction=-0.1", "data.max_bad_fraction must be 0 or more"),
        ("data.max_bad_fraction=nan", "data.max_bad_fraction must be 0 or more"),
        ("data.workers=-1", "data.workers must be 0 or more"),
        ("data.validation_count=0", "data.validation_count must be 1 or more"),
        ("data.crop=centre", "data.crop must be random or random_resized or native"),
    ],
)
def test_senseless_setting_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", [setting])
