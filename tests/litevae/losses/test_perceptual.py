"""LPIPS and ST-LPIPS against their packages, and ESRGAN's loss against torchvision's VGG19, in float64."""

import copy
import io
import pickle
import warnings
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch
import torchvision
from torchvision.transforms.functional import normalize

from litevae.errors import UserError
from litevae.losses import LPIPS, STLPIPS, ESRGANLoss
from litevae.losses.perceptual import EPS, unit_vectors

SHAPE = (2, 3, 32, 48)
# A sum over 3x3 taps and up to 512 channels has a rounding error of sqrt(4608) half units in the last place (a random
# walk), and there are at most 16 layers.
FLOAT32 = 16 * 4608**0.5 * 2**-24
# In float64 the only errors are those of the normalisation's two constants, rounded to float32, for two images.
CONSTANTS = 4 * 2**-24

LOSSES = pytest.mark.parametrize("name", ["lpips", "st_lpips", "esrgan"])


@pytest.fixture(scope="module")
def losses():
    return {
        "lpips": LPIPS(pretrained=False),
        "st_lpips": STLPIPS(),
        "esrgan": ESRGANLoss(pretrained=False),
    }


def weights_of(features):
    """Returns the weights with the keys of torchvision's checkpoints."""
    return {f"features.{key}": value for key, value in features.layers.named_buffers()}


@pytest.fixture(scope="module")
def oracles(losses, st_lpips_package):
    with (
        torch.device("meta"),
        warnings.catch_warnings(action="ignore"),
    ):  # lpips uses torchvision's old arguments
        package = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        vgg19 = torchvision.models.vgg19()
    own = losses["lpips"].features.layers
    package.load_state_dict(
        {
            f"net.slice{index}.{layer}.{key}": value
            for index, slice_layers in enumerate(
                [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)], 1
            )
            for layer in slice_layers
            for key, value in own[layer].named_buffers()
        },
        strict=False,
        assign=True,
    )
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    package.load_state_dict(
        torch.load(path, map_location="cpu", weights_only=True), strict=False, assign=True
    )
    package.double()

    features = vgg19.features
    features.load_state_dict(dict(losses["esrgan"].features.layers.named_buffers()), assign=True)
    features.double()
    seen = []
    features[34].register_forward_hook(lambda _, __, output: seen.append(output.clone()))  # ReLU is in place

    def esrgan(image, reconstruction):
        seen.clear()
        for each in (image, reconstruction):
            features(normalize((each + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert (seen[0] < 0).any()
        return (seen[0] - seen[1]).abs().mean()

    shift_tolerant = copy.deepcopy(st_lpips_package).double()
    return {
        "lpips": lambda *images: package(*images).mean(),
        "st_lpips": lambda *images: shift_tolerant(*images).mean(),
        "esrgan": esrgan,
    }


def value_and_gradient(loss, image, reconstruction):
    reconstruction = reconstruction.clone().requires_grad_()
    value = loss(image, reconstruction)
    value.backward()
    return value.detach().double(), reconstruction.grad.double()


@LOSSES
def test_equals_the_library(name, losses, oracles, pair):
    image, reconstruction = pair(SHAPE)
    value, gradient = value_and_gradient(oracles[name], image, reconstruction)

    exact = value_and_gradient(copy.deepcopy(losses[name]).double(), image, reconstruction)
    torch.testing.assert_close(exact[0], value, rtol=CONSTANTS, atol=0)
    torch.testing.assert_close(exact[1], gradient, rtol=0, atol=CONSTANTS * gradient.abs().max().item())

    single = value_and_gradient(losses[name], image.float(), reconstruction.float())
    torch.testing.assert_close(single[0], value, rtol=FLOAT32, atol=0)
    # Single elements differ where a rounding error changes the decision of a ReLU or of a pooling.
    assert (single[1] - gradient).norm() < 1e-2 * gradient.norm()


@LOSSES
@pytest.mark.parametrize("fill", [None, -1.0, 0.0, 1.0])
def test_gradient_is_zero_at_equal_images(name, fill, losses, pair):
    image = pair(SHAPE)[0].float() if fill is None else torch.full(SHAPE, fill)
    value, gradient = value_and_gradient(losses[name], image, image)
    assert value == 0
    assert gradient.count_nonzero() == 0


@LOSSES
def test_gradient_is_finite_between_constant_images(name, losses):
    value, gradient = value_and_gradient(losses[name], torch.zeros(SHAPE), torch.full(SHAPE, 1.0))
    assert value > 0
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize(("name", "last"), [("lpips", 28), ("st_lpips", 13)])
def test_zero_features_have_a_finite_gradient(name, last, losses, pair):
    features = torch.zeros(1, 4, 2, 2)
    features[0, 1, 0, 0] = 1e-15  # without EPS its slope would be 1e15
    features.requires_grad_()
    (unit_vectors(features) - 0.5).square().sum().backward()
    assert 0 < features.grad.abs().max() < 10 / EPS**0.5

    dead = copy.deepcopy(losses[name])
    dead.features.layers[last].bias.fill_(-1e6)
    image, reconstruction = (each.float() for each in pair(SHAPE))
    value, gradient = value_and_gradient(dead, image, reconstruction)
    assert 0 < value < losses[name](image, reconstruction)
    assert gradient.isfinite().all()


@LOSSES
def test_is_float32_under_autocast(name, losses, pair):
    images = [each.bfloat16() for each in pair(SHAPE)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses[name](*images)
    assert loss.dtype == torch.float32
    assert loss == losses[name](*(each.float() for each in images))


@LOSSES
def test_compiles_as_one_graph(name, losses, pair):
    images = [each.float() for each in pair(SHAPE)]
    compiled = torch.compile(losses[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*images), losses[name](*images))


@LOSSES
def test_is_a_constant(name, losses):
    assert not list(losses[name].parameters())
    assert not losses[name].state_dict()
    losses[name].load_state_dict({})


def test_random_weights_repeat_and_leave_the_global_state(losses):
    before = torch.get_rng_state()
    again = LPIPS(pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    weights = dict(losses["lpips"].named_buffers())
    assert all(torch.equal(buffer, weights[key]) for key, buffer in again.named_buffers())


class TestDownload:
    """The file of VGG16 is vgg16-397923af.pth."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "urlopen", self.no_connection)
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        return tmp_path / "checkpoints"

    @staticmethod
    def no_connection(*_, **__):
        raise URLError("no route to host")

    def test_file_that_is_there_is_used(self, folder, losses):
        weights = weights_of(losses["lpips"].features)
        torch.save(
            {**{key: value / 2 for key, value in weights.items()}, "classifier.0.bias": torch.zeros(1)},
            folder / "vgg16-397923af.pth",
        )
        loaded = weights_of(LPIPS().features)
        assert all(torch.equal(loaded[key], value / 2) for key, value in weights.items())

    def test_no_connection_names_the_file_and_the_address(self, folder):
        with pytest.raises(UserError) as caught:
            LPIPS()
        message = str(caught.value)
        assert str(folder / "vgg16-397923af.pth") in message
        assert torchvision.models.VGG16_Weights.IMAGENET1K_V1.url in message
        assert "no route to host" in message
        assert "\n" not in message
        assert not list(folder.iterdir())

    @pytest.mark.parametrize("breaks", [True, False])
    def test_half_a_download_is_not_kept(self, folder, breaks, monkeypatch):
        class Response(io.BytesIO):
            def info(self):
                return type("Headers", (), {"get_all": staticmethod(lambda _: None)})

            def read(self, size):
                data = super().read(size)
                if breaks and not data:
                    raise IncompleteRead(b"", 100)
                return data

        monkeypatch.setattr(torch.hub, "urlopen", lambda _: Response(b"half"))
        with pytest.raises(UserError, match="IncompleteRead" if breaks else "invalid hash value"):
            LPIPS()
        assert not list(folder.iterdir())

    @pytest.mark.parametrize("content", ["nothing", "text", "another network"])
    def test_wrong_file_is_named(self, folder, content, losses):
        path = folder / "vgg19-dcbb9e9d.pth"
        if content == "another network":
            torch.save({"conv1.weight": torch.zeros(1)}, path)
        else:
            path.write_text("" if content == "nothing" else "<html>")
        with pytest.raises(UserError, match=r"vgg19-dcbb9e9d\.pth is not torchvision's vgg19"):
            ESRGANLoss()

    def test_code_in_a_file_does_not_run(self, folder, tmp_path):
        class Code:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (folder / "vgg16-397923af.pth").write_bytes(pickle.dumps({"features.0.weight": Code()}, 2))
        with pytest.raises(UserError, match="delete it"):
            LPIPS()
        assert not (tmp_path / "ran").exists()
