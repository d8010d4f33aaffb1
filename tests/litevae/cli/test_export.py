import json

import numpy as np
import pytest
import torch

from litevae import LiteVAE
from litevae.cli.export import photographs
from litevae.models import export as exporting

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:config.json has scaling_factor and latents_mean"),
]


@pytest.fixture
def wavelet_model(tmp_path):
    """A model whose encoder is a Haar transform, which every format exports in seconds."""
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 8), "layers_per_block": 1, "num_groups": 4, "scaling_factor": 0.5}
    options |= {"latents_mean": [0.0] * 12, "latents_std": [2.0] * 12}
    model = LiteVAE(encoder_type="dwt", latent_channels=12, decoder_norm="smc", **options)
    model.save_pretrained(tmp_path / "model")
    return model


def test_onnx_runs_and_states_what_it_is(litevae, wavelet_model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output = tmp_path / "out"
    lines = litevae("export", tmp_path / "model", output).splitlines()
    assert sorted(path.name for path in output.iterdir()) == ["decoder.onnx", "encoder.onnx", "export.json"]
    record = json.loads((output / "export.json").read_text())
    assert (record["format"], record["precision"], record["opset"]) == ("onnx", "fp32", 18)
    assert (record["scaling_factor"], record["shift_factor"]) == (0.5, None)
    assert (record["latents_mean"], record["latents_std"]) == ([0.0] * 12, [2.0] * 12)
    assert record["parts"]["encoder"]["input"] == {
        "name": "image",
        "shape": ["batch", 3, "2*height", "2*width"],
    }
    for line, part in zip(lines, ("encoder", "decoder"), strict=True):
        assert line.startswith(f"{output / part}.onnx: ")
        error = record["parts"][part]["relative_error"]
        assert 0 <= error < 1e-4
        assert f"relative error {error:.1e}" in line

    session = onnxruntime.InferenceSession(output / "decoder.onnx", providers=["CPUExecutionProvider"])
    (argument,), (result,) = session.get_inputs(), session.get_outputs()
    assert (argument.name, argument.shape) == ("latent", ["batch", 12, "height", "width"])
    assert (result.name, result.shape) == ("image", ["batch", 3, "2*height", "2*width"])
    latent = torch.randn(3, 12, 5, 9)
    with torch.no_grad():
        expected = wavelet_model.decode(latent).sample.numpy()
    np.testing.assert_allclose(
        session.run(None, {"latent": latent.numpy()})[0], expected, rtol=1e-3, atol=1e-4
    )


def test_existing_files_are_kept(fails, wavelet_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "decoder.pt2").write_text("mine")
    arguments = ("export", tmp_path / "model", tmp_path / "out", "--format", "torch-export")
    assert "decoder.pt2 already exists" in fails(*arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["decoder.pt2"]


@pytest.mark.parametrize("way", ["itself", "run", "link"])
def test_the_folder_of_the_model_is_refused(fails, wavelet_model, tmp_path, way):
    folder = tmp_path / "model"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    model, output = {
        "itself": (folder, folder),
        "run": (tmp_path, folder),
        "link": (folder, tmp_path / "link"),
    }[way]
    message = fails("export", model, output, "--format", "torch-export", "--overwrite")
    assert f"{output} is the model's own folder: give another folder" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu7"], "--device gpu7: "),
        (["--device", "meta"], "--device meta: "),
        (["--format", "openvino", "--precision", "bf16"], "precision must be fp32 or fp16 for openvino"),
        (["--precision", "bf16"], "ONNX Runtime cannot run bf16 on a CPU"),
        (["--opset", "7"], "'--opset'"),
        *(
            (["--format", format, "--opset", "18"], f"--opset 18: {format} has no opset; only --format onnx")
            for format in ("torch-export", "aoti", "openvino")
        ),
    ],
)
def test_refused_before_any_work(fails, tmp_path, options, message):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    assert message in fails("export", tmp_path / "none", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if "onnx" in name else name)
    message = fails("export", tmp_path / "model", tmp_path / "out")
    assert (
        "onnx needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime" in message
    )


def test_wrong_file_is_not_kept(fails, wavelet_model, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "load_exported", lambda *_: lambda x: torch.zeros(1))
    message = fails("export", tmp_path / "model", tmp_path / "out", "--format", "torch-export")
    assert (
        "encoder.pt2: its output is wrong: the relative error is 1, and at most 0.0001 is due to fp32"
        in message
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("size", "batches"), [(320, 1), (None, 2)])
def test_photographs_fit_the_model(size, batches):
    """The smallest photograph has fewer rows than a model of 320 pixels takes."""
    options = (
        {"aggregator": "vit", "sample_size": size} if size else {"encoder_type": "dwt", "latent_channels": 12}
    )
    with torch.device("meta"):
        model = LiteVAE(block_out_channels=(8, 8), num_groups=4, **options)
    with torch.device("cpu"):
        found = photographs(model)
    assert len(found) == batches
    assert found[0].shape == (3, 3, size or 64, size or 64)  # 32 pixels of the latent per side
    assert all(-1 <= batch.min() < batch.max() <= 1 for batch in found)
