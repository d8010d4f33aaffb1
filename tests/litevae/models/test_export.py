"""Export and tracing: with dynamic sizes, without custom operators, and without warnings of the tracer."""

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.export import Dim

from litevae.errors import UserError
from litevae.models import encoder
from litevae.models.export import PACKAGES, RUNTIMES, Format, compare_exported, export_model

WAVELET = {"decoder_norm": "smc", "output_type": "wavelet"}
SIZES = [(1, 3, 8, 8), (3, 3, 20, 12)]


class Moments(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).latent_dist.parameters


class Mode(Moments):
    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).latent_dist.mode()


class Whole(Moments):
    def forward(self, image: Tensor) -> Tensor:
        return self.vae(image).sample


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Makes the encoder slice its batch where it may."""
    monkeypatch.setattr(encoder, "SLICE_PIXELS", {"cpu": 1})


@pytest.fixture
def make(make_variant):
    """Returns a function that makes a LiteVAE of two levels with the fewest layers, in evaluation mode."""
    return lambda **options: make_variant(block_out_channels=(8, 8, 8), **options).eval()


def dynamic_shapes() -> dict[str, dict[int, Dim]]:
    return {"image": {0: Dim("n", min=1, max=64), 2: 4 * Dim("h", min=2), 3: 4 * Dim("w", min=2)}}


def assert_equal_for_all_sizes(actual: Callable[[Tensor], Tensor], expected: nn.Module) -> None:
    with torch.no_grad():
        for size in SIZES:
            image = torch.randn(size)
            exact = expected(image)
            # A float32 convolution by Winograd's algorithm errs by 1e-6 of its result's size, and there are about 50.
            atol = 50 * 1e-6 * exact.abs().max().item()
            torch.testing.assert_close(actual(image), exact, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("part", "options", "strict", "gradients"),
    [
        (Moments, {}, False, False),
        (Mode, {}, True, True),
        pytest.param(Whole, {}, True, False, marks=pytest.mark.slow),
        (Whole, WAVELET, False, True),
    ],
)
def test_export_with_dynamic_sizes(make, image, part, options, strict, gradients):
    model = part(make(**options))
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (image,), dynamic_shapes=dynamic_shapes(), strict=strict)
    assert "litevae" not in str(exported.graph)
    assert_equal_for_all_sizes(exported.module(), model)


@pytest.mark.parametrize(("options", "gradients"), [({}, True), (WAVELET, False)])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")  # deprecated, but OpenVINO uses it
def test_trace(make, image, options, gradients):
    model = Whole(make(**options))
    with torch.set_grad_enabled(gradients), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        # The tracer's own check has a fixed tolerance, which the kernels' convolutions may exceed by rounding.
        traced = torch.jit.trace(model, image, check_trace=False)
    assert not [each for each in caught if issubclass(each.category, torch.jit.TracerWarning)]
    assert_equal_for_all_sizes(traced, model)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.trace", "ignore:You are using the legacy TorchScript", "ignore:.*dynamo"
)
def test_the_old_exporter_of_onnx_writes_dynamic_sizes(make, image):
    import onnxruntime

    model, file = Whole(make(**WAVELET | {"encoder_norm": "group"})), io.BytesIO()
    axes = {"image": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(model, (image,), file, dynamo=False, input_names=["image"], dynamic_axes=axes)
    run = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"]).run
    assert_equal_for_all_sizes(lambda x: torch.from_numpy(run(None, {"image": x.numpy()})[0]), model)


def encoders(format: str) -> list:
    """Parameters of a test: the Haar encoder, which is exported in seconds, and the learned one."""
    needs = [name for name in PACKAGES.get(format, ()) + RUNTIMES.get(format, ()) if find_spec(name) is None]
    skip = [pytest.mark.skipif(bool(needs), reason=f"needs {', '.join(needs)}")]
    haar = {"encoder_type": "dwt", "latent_channels": 12, "block_out_channels": (8, 8), "decoder_norm": "smc"}
    if format == "onnx":  # the test of the command exports that
        return [pytest.param(format, {}, marks=[*skip, pytest.mark.slow])]
    return [pytest.param(format, haar, marks=skip), pytest.param(format, {}, marks=[*skip, pytest.mark.slow])]


@pytest.mark.parametrize(
    ("format", "options"), [each for name in get_args(Format) for each in encoders(name)]
)
def test_files_run_with_dynamic_sizes(make_variant, tmp_path, format, options):
    make_variant(**({"block_out_channels": (8, 8, 8)} | options)).save_pretrained(tmp_path / "model")
    (tmp_path / "files").mkdir()
    script = Path(__file__).with_name("exported.py")
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "model", tmp_path / "files", format],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stderr
    errors = json.loads(ended.stdout.splitlines()[-1])
    assert set(errors) == {"encoder", "decoder"}
    assert max(errors.values()) < 1e-5


def test_half_precision_and_a_fixed_size(make_variant, tmp_path):
    model = make_variant(
        block_out_channels=(8, 8, 8), extractor="nafnet", aggregator="vit", sample_size=16
    ).eval()
    files = export_model(model, tmp_path, "torch-export", "bf16")
    errors = compare_exported(model, files, "torch-export", "bf16", [torch.randn(3, 3, 16, 16)])
    assert 1e-4 < max(errors.values()) < 5e-2
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("format", "precision", "message"),
    [
        ("pt2", "fp32", "format must be onnx, torch-export, aoti, openvino, got 'pt2'"),
        ("onnx", "int8", "precision must be fp32, fp16, bf16, got 'int8'"),
    ],
)
def test_unknown_format_or_precision_is_refused(make_variant, tmp_path, format, precision, message):
    with pytest.raises(UserError, match=message):
        export_model(make_variant(block_out_channels=(8, 8)), tmp_path, format, precision)
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_kl_takes_any_batch(tmp_path):
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    files = export_model(model, tmp_path, "torch-export")
    images = [torch.randn(1, 3, 8, 12), torch.randn(70, 3, 8, 8)]
    assert max(compare_exported(model, files, "torch-export", "fp32", images).values()) < 1e-5
