import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from litevae import LiteVAE
from litevae.cli import main
from litevae.data.images import read_image
from litevae.evaluation.yardsticks import reconstruct_without_learning


def image_files(folder):
    """Writes one file of each awkward kind, of sizes that are not multiples of 8."""
    rgb = data.chelsea()[100:145, 60:127]
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = rgb[..., 1]
    files = {
        "odd.png": (Image.fromarray(rgb), {}),
        "grey.png": (Image.fromarray(grey), {}),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "palette.gif": (Image.fromarray(rgb).convert("P"), {}),
        "alpha.png": (Image.fromarray(np.dstack([rgb, grey])), {}),
        "turned.jpg": (Image.fromarray(rgb), {"exif": exif, "quality": 95}),
        "cmyk.tif": (Image.fromarray(rgb).convert("CMYK"), {}),
        "tiny.png": (Image.fromarray(rgb[:1, :3]), {}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return [folder / name for name in files]


def test_every_kind_of_image(litevae, model, tmp_path):
    images = image_files(tmp_path)
    lines = litevae("reconstruct", model, *images, "-o", tmp_path / "out").splitlines()
    loaded, values, yardsticks = LiteVAE.from_pretrained(model), [], []
    for path, line in zip(images, lines, strict=False):
        pixels = read_image(path)
        result = Image.open(tmp_path / "out" / f"{path.stem}.png")
        assert (result.mode, result.size) == ("RGB", (pixels.shape[1], pixels.shape[0]))
        values.append(peak_signal_noise_ratio(pixels, np.asarray(result)))
        yardsticks.append(
            peak_signal_noise_ratio(pixels, reconstruct_without_learning(loaded, pixels)["haar"])
        )
        below = " (below the Haar yardstick)" if values[-1] < yardsticks[-1] else ""
        assert line == (
            f"{path}: {result.width}x{result.height}, PSNR {values[-1]:.2f} dB{below}, "
            f"12 Haar coefficients per 8x8 block {yardsticks[-1]:.2f} dB, {tmp_path / 'out' / path.stem}.png"
        )
    assert Image.open(tmp_path / "out" / "turned.png").size == (45, 67)
    assert lines[len(images) :] == [
        f"mean PSNR of 8 images: {np.mean(values):.2f} dB, "
        f"12 Haar coefficients per 8x8 block {np.mean(yardsticks):.2f} dB"
    ]
    assert len(list((tmp_path / "out").iterdir())) == len(images)


def test_a_picture_shows_the_yardstick_beside_the_reconstruction(litevae, fails, model, tmp_path):
    image = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()[:24, :32]).save(image)
    command = ["reconstruct", model, image, "-o", tmp_path / "out", "--picture", tmp_path / "rows.png"]
    assert litevae(*command).endswith(f"see {tmp_path / 'rows.png'}\n")
    width, height = Image.open(tmp_path / "rows.png").size
    assert width > 4 * height  # four pictures of 4:3 side by side
    assert "is an input or a reconstruction" in fails(
        *command[:-1], tmp_path / "out" / "cat.png", "--overwrite"
    )


def test_same_names_get_numbers(litevae, model, tmp_path):
    images = []
    for folder, size in (("a", 16), ("b", 24), ("c", 32)):
        (tmp_path / folder).mkdir()
        images.append(tmp_path / folder / "x.png")
        Image.fromarray(data.chelsea()[:size, :size]).save(images[-1])
    litevae("reconstruct", model, *images, "-o", tmp_path / "out")
    sizes = {path.name: Image.open(path).width for path in (tmp_path / "out").iterdir()}
    assert sizes == {"x.png": 16, "x-2.png": 24, "x-3.png": 32}


def test_input_is_never_overwritten(fails, model, tmp_path):
    (image,) = [path for path in image_files(tmp_path) if path.name == "odd.png"]
    before = image.read_bytes()
    assert "would be overwritten" in fails("reconstruct", model, image, "-o", tmp_path)
    assert image.read_bytes() == before


def test_not_an_image(fails, model, tmp_path):
    (tmp_path / "x.png").write_text("text")
    assert "x.png: not an image" in fails("reconstruct", model, tmp_path / "x.png", "-o", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_bad_images_are_named_and_the_others_reconstructed(model, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        Image.fromarray(data.chelsea()[:16, :16]).save(tmp_path / name)
    (tmp_path / "b.png").write_text("text")
    images = [str(tmp_path / f"{name}.png") for name in "bac"]
    assert main(["reconstruct", str(model), *images, "-o", str(tmp_path / "out")]) == 2
    output, errors = capsys.readouterr()
    assert f"{images[0]}: not an image" in errors.splitlines()[0]
    assert errors.splitlines()[1:] == ["litevae: error: 1 of 3 images cannot be reconstructed"]
    assert "mean PSNR of 2 images" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_output_that_cannot_be_made(fails, model, tmp_path):
    image = image_files(tmp_path)[0]
    assert "cannot be made" in fails("reconstruct", model, image, "-o", image / "out")


def test_a_file_is_only_overwritten_on_request(model, litevae, fails, tmp_path):
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.png").write_text("mine")
    command = ["reconstruct", str(model), str(tmp_path / "photo.jpg"), "-o", str(tmp_path)]
    assert "already exists" in fails(*command)
    assert (tmp_path / "photo.png").read_text() == "mine"
    litevae(*command, "--overwrite")
    assert Image.open(tmp_path / "photo.png").size == (30, 20)


@pytest.mark.parametrize("name", ["rows.txt", "rows"])
def test_a_picture_is_a_png_file(fails, model, tmp_path, name):
    image = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()[:24, :32]).save(image)
    command = ["reconstruct", model, image, "-o", tmp_path / "out", "--picture", tmp_path / name]
    assert f"{name}: the picture's name must end in .png" in fails(*command)
    assert not (tmp_path / "out").exists()


def test_a_picture_replaces_a_link_that_leads_nowhere(litevae, model, tmp_path):
    image, picture = tmp_path / "cat.png", tmp_path / "loop.png"
    Image.fromarray(data.chelsea()[:24, :32]).save(image)
    picture.symlink_to(picture.name)
    litevae("reconstruct", model, image, "-o", tmp_path / "out", "--picture", picture)
    assert picture.is_file()
