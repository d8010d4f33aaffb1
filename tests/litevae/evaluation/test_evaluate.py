import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import litevae.evaluation.evaluate as evaluate_module
import litevae.evaluation.metrics as metrics_module
from litevae import LiteVAE
from litevae.data.sources import open_images
from litevae.errors import UserError
from litevae.evaluation.evaluate import evaluate
from litevae.evaluation.metrics import batch_psnr, batch_ssim
from litevae.evaluation.yardsticks import YARDSTICKS, reconstruct_without_learning
from litevae.losses.perceptual import LPIPS

SIZE = 32
COUNT = 7

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with squares that are not resized, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        Image.fromarray(data.chelsea()[20 * i : 20 * i + SIZE, 30 * i : 30 * i + SIZE]).save(
            folder / f"{i}.png"
        )
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    model.save_pretrained(tmp_path_factory.mktemp("model"))
    return model


@pytest.fixture(scope="module")
def pairs(model, folder):
    """The images and the model's reconstructions, (7, 32, 32, 3) uint8 each."""
    pixels = np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(COUNT)])
    with torch.no_grad():
        decoded = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 127.5 - 1).sample
    result = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels, result.permute(0, 2, 3, 1).numpy()


class Colours(torch.nn.Module):
    """Features that are easy to compute: the mean of each colour. They are kept."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images.double().mean((2, 3)))
        return self.seen[-1]


def skimage_ssim(a, b):
    """Returns scikit-image's SSIM with the window and the variance of the original paper."""
    return structural_similarity(
        a,
        b,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


def test_psnr_and_ssim_are_scikit_images():
    rng = np.random.default_rng(0)
    x = np.stack(
        [data.chelsea()[:70, :80], np.full((70, 80, 3), 250, np.uint8), data.chelsea()[100:170, :80]]
    )
    # Noise, noise on a bright flat image, and a shift.
    y = np.clip(x + rng.normal(0, (8, 1, 0), (70, 80, 3, 3)).transpose(3, 0, 1, 2), 0, 255).astype(np.uint8)
    y[2] = np.roll(y[2], 1, axis=0)
    tensors = [torch.from_numpy(z).permute(0, 3, 1, 2) for z in (x, y)]
    expected = [skimage_ssim(a, b) for a, b in zip(x, y, strict=True)]
    assert batch_ssim(*tensors).tolist() == pytest.approx(expected, rel=1e-9)
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(x, y, strict=True)]
    assert batch_psnr(*tensors).tolist() == pytest.approx(expected, rel=1e-12)


def test_all_metrics_of_a_folder(model, folder, pairs, st_lpips_package, monkeypatch):
    """The expected values come from float64 formulas and scikit-image on the model's reconstructions."""
    lpips = LPIPS(pretrained=False)
    monkeypatch.setattr(metrics_module, "LPIPS", lambda: lpips)
    features, names = Colours(), ["rfid", "lpips", "st_lpips", "psnr", "ssim"]
    found = evaluate(model, open_images(str(folder)), names, SIZE, batch_size=3, workers=0, features=features)
    assert (found.count, found.unreadable, found.exact) == (COUNT, 1, 0)
    assert list(found.values) == names

    assert found.values["psnr"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(*pairs, strict=True)]), abs=1e-4
    )
    ssim = [skimage_ssim(a, b) for a, b in zip(*pairs, strict=True)]
    assert found.values["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)

    def distance(network, *pairs):
        """Returns the mean of a network's distances of the images, one by one."""
        tensors = [torch.from_numpy(z).permute(0, 3, 1, 2).float() / 127.5 - 1 for z in pairs]
        return np.mean(
            [network(*pair).item() for pair in zip(*(each.split(1) for each in tensors), strict=True)]
        )

    # The networks compute in float32, and the batches have another size.
    assert found.values["lpips"] == pytest.approx(distance(lpips, *pairs), rel=1e-4)
    assert found.values["st_lpips"] == pytest.approx(distance(st_lpips_package, *pairs), rel=1e-4)

    a, b = (torch.cat(features.seen[side::5]).numpy() for side in (0, 1))
    for z, pixels in zip((a, b), pairs, strict=True):  # another batch size can round a pixel differently
        assert z == pytest.approx(pixels.mean((1, 2), dtype=np.float64), abs=5 / SIZE**2)
    covariances = [np.cov(z, rowvar=False) for z in (a, b)]
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert found.values["rfid"] == pytest.approx(frechet, rel=1e-9)

    # The yardsticks are measured like another model on the same images.
    assert list(found.yardsticks) == list(YARDSTICKS)
    for number, name in enumerate(YARDSTICKS):
        restored = np.stack([reconstruct_without_learning(model, image)[name] for image in pairs[0]])
        values = found.yardsticks[name]
        assert list(values) == list(found.values)
        expected = [peak_signal_noise_ratio(x, y) for x, y in zip(pairs[0], restored, strict=True)]
        assert values["psnr"] == pytest.approx(np.mean(expected))
        expected = [skimage_ssim(x, y) for x, y in zip(pairs[0], restored, strict=True)]
        assert values["ssim"] == pytest.approx(np.mean(expected))
        c = torch.cat(features.seen[2 + number :: 5]).numpy()
        assert c == pytest.approx(restored.mean((1, 2)))
        covariances = [np.cov(z, rowvar=False) for z in (a, c)]
        frechet = ((a.mean(0) - c.mean(0)) ** 2).sum() + np.trace(
            sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real
        )
        assert values["rfid"] == pytest.approx(frechet, rel=1e-6, abs=1e-6)
        assert (values["lpips"] > 0) == (values["psnr"] < np.inf)
        expected = distance(st_lpips_package, pairs[0], restored)
        assert values["st_lpips"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_an_interrupted_evaluation_goes_on(model, folder, tmp_path, sample, monkeypatch):
    def run(batch_size=3, identity="weights", model=model):
        return evaluate(
            model,
            open_images(str(folder)),
            ["rfid", "psnr", "ssim"],
            SIZE,
            batch_size=batch_size,
            workers=0,
            sample=sample,
            partial=tmp_path / "partial",
            identity={"weights": identity},
            features=Colours(),
        )

    whole = run()
    assert not list(tmp_path.iterdir())
    # The order of the sums differs.
    assert run(batch_size=2).values == pytest.approx(whole.values, rel=1e-9)

    monkeypatch.setattr(evaluate_module, "SAVE_EVERY", 0.0)
    once, calls = evaluate_module.reconstruct_batch, []

    def stop_at_third(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    monkeypatch.setattr(evaluate_module, "reconstruct_batch", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(UserError, match="was left by an interrupted evaluation with other settings"):
        run(identity="others")
    assert run() == whole
    assert sum(calls) == COUNT + calls[2]  # only the interrupted batch was done twice
    assert not list(tmp_path.iterdir())
    (tmp_path / "partial").write_text("cut off")
    with pytest.raises(UserError, match="partial: cannot be read"):
        run()


def test_a_sample_is_the_images_own(model, folder):
    def run(sample, batch_size):
        return evaluate(
            model, open_images(str(folder)), ["psnr"], SIZE, batch_size=batch_size, workers=0, sample=sample
        )

    assert run(True, 2).values["psnr"] == pytest.approx(run(True, 5).values["psnr"], abs=1e-3)
    assert run(True, 2).values["psnr"] != run(False, 2).values["psnr"]


def test_images_without_an_error_are_left_out_of_the_psnr():
    sums = evaluate_module.Sums(("psnr", "ssim"), None)
    image = torch.from_numpy(data.chelsea()[None, :SIZE, :SIZE].copy()).permute(0, 3, 1, 2)
    yardsticks = dict.fromkeys(YARDSTICKS, image ^ 3)
    sums.add(image, {"model": image, **yardsticks})
    assert sums.result().values == {"psnr": np.inf, "ssim": 1}
    sums.add(image, {"model": image ^ 1, **yardsticks})  # off by one everywhere
    found = sums.result()
    assert (found.count, found.exact) == (2, 1)
    assert found.values["psnr"] == pytest.approx(20 * np.log10(255))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"metrics": ["psnr", "fid"]},
            "unknown metric 'fid': choose from rfid, lpips, st_lpips, psnr, ssim",
        ),
        (
            {"metrics": ["st_lpips"], "size": 20},
            "st_lpips needs images of at least 21 pixels a side, got 20",
        ),
        ({"metrics": []}, "no metrics given"),
        ({"size": 30}, "size must be a multiple of 4, at least 16, got 30"),
        ({"size": 12}, "size must be a multiple of 4, at least 16, got 12"),
        ({"metrics": ["rfid"], "count": 1}, "rfid needs at least two images"),
    ],
)
def test_what_cannot_be_measured(model, folder, settings, message):
    (settings := {"metrics": ["psnr"], "size": SIZE, "workers": 0} | settings)
    with pytest.raises(UserError, match=message):
        evaluate(model, open_images(str(folder)), features=Colours(), **settings)


def test_nothing_readable_says_why(model, broken_images):
    folder, message = broken_images
    with pytest.raises(UserError) as caught:
        evaluate(model, open_images(str(folder)), ["psnr"], SIZE, workers=0)
    assert str(caught.value) == message


def test_a_model_that_diverged(folder):
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    torch.nn.init.constant_(model.decoder.conv_out.bias, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, open_images(str(folder)), ["psnr"], SIZE, workers=0)


SHARED = """
import os, sys, torch
from litevae import LiteVAE
from litevae.evaluation.evaluate import evaluate
from litevae.data.sources import open_images
torch.set_num_threads(1)
class Colours(torch.nn.Module):
    num_features = 3
    def forward(self, images):
        return images.double().mean((2, 3))
rank = os.fork() and 1
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
found = evaluate(
    LiteVAE.from_pretrained(sys.argv[1]), open_images(sys.argv[2]), ["rfid", "psnr", "ssim"], 32,
    batch_size=2, workers=0, sample=True, features=Colours(),
)
sys.stdout.write(repr(found) + "\\n")
sys.stdout.flush()
torch.distributed.destroy_process_group()
if rank:
    assert os.wait()[1] == 0
"""


def test_processes_share_the_images(model, folder, tmp_path):
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = subprocess.run(
        [sys.executable, "-c", SHARED, tmp_path, folder],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second
    alone = evaluate(
        model,
        open_images(str(folder)),
        ["rfid", "psnr", "ssim"],
        SIZE,
        batch_size=2,
        workers=0,
        sample=True,
        features=Colours(),
    )
    shared = eval(first, {"Evaluation": evaluate_module.Evaluation})
    assert (shared.count, shared.unreadable, shared.exact) == (COUNT, 1, 0)
    # The order of the sums differs, and float32 convolutions of another batch can round a pixel differently.
    assert shared.values == pytest.approx(alone.values, rel=1e-3)
