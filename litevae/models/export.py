"""Export of an autoencoder's encoder and decoder to the formats of other runtimes."""

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from litevae.environment import DTYPES
from litevae.errors import UserError, one_line, shorten
from litevae.models.autoencoder import LiteVAE
from litevae.models.interface import Autoencoder, fixed_size, spatial_compression

Format = Literal["onnx", "torch-export", "aoti", "openvino"]
Part = Literal["encoder", "decoder"]
OPSET = 18  # version of ONNX's operator set that TensorRT 10, OpenVINO and ONNX Runtime support

# Suffixes of the files of a part. The first is that of the file to load.
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "aoti": (".pt2",),
    "openvino": (".xml", ".bin"),
}
PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}
RUNTIMES: dict[Format, tuple[str, ...]] = {"onnx": ("onnxruntime",)}  # beside PACKAGES
# Largest relative error against the model in float32. A graph that is wrong is off by far more.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class Encode(nn.Module):
    """Maps images to the moments of the posterior: the mean, then the log-variance, along the channels."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode(image).latent_dist.parameters


class Decode(nn.Module):
    """Maps latents to images."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent).sample


class Enlarge(nn.Module):
    """The upsampling layer of an `AutoencoderKL`, without branches on the batch size.

    diffusers copies large channels-last batches, which limits an exported graph to batches below 64.

    Args:
        layer: layer of the decoder that is replaced.
    """

    def __init__(self, layer: Upsample2D) -> None:
        super().__init__()
        self.conv = layer.conv

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        enlarged = nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        convolved: Tensor = self.conv(enlarged)
        return convolved


@dataclass(frozen=True)
class Signature:
    """Names of a part's input and output, and the symbolic shapes of both."""

    input: str
    output: str
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]


def signatures(model: Autoencoder) -> dict[Part, Signature]:
    """Returns the inputs and outputs of the exported parts; symbolic sizes are those of the latent."""
    f, side = spatial_compression(model), fixed_size(model)
    channels, latent_channels = model.config.in_channels, model.config.latent_channels
    latent: tuple[int | str, ...] = ("height", "width")
    image: tuple[int | str, ...] = (f"{f}*height", f"{f}*width")
    encoded = ((side, side), (side // f, side // f)) if side else (image, latent)
    return {
        "encoder": Signature(
            "image",
            "moments",
            ("batch", channels, *encoded[0]),
            ("batch", 2 * latent_channels, *encoded[1]),
        ),
        "decoder": Signature(
            "latent", "image", ("batch", latent_channels, *latent), ("batch", channels, *image)
        ),
    }


def check_export(format: Format, precision: str, device: torch.device, check: bool) -> None:
    """Checks that an export can be made, before any work.

    Args:
        format: file format.
        precision: "fp32", "bf16" or "fp16".
        device: device that the files are for.
        check: whether the result will be run.

    Raises:
        UserError: there is no such format or precision, a package is not installed, or the format does not have the
            precision or the device.
    """
    if format not in SUFFIXES:
        raise UserError(f"format must be {', '.join(SUFFIXES)}, got {shorten(format)}")
    if precision not in TOLERANCES:
        raise UserError(f"precision must be {', '.join(TOLERANCES)}, got {shorten(precision)}")
    needed = PACKAGES.get(format, ()) + (RUNTIMES.get(format, ()) if check else ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        way_out = (
            "" if set(missing) & set(PACKAGES[format]) else ", or leave out the comparison with --no-check"
        )
        raise UserError(f"{format} needs {' and '.join(missing)}: pip install {' '.join(missing)}{way_out}")
    if precision == "bf16" and format == "openvino":
        raise UserError(
            "precision must be fp32 or fp16 for openvino, whose INFERENCE_PRECISION_HINT chooses bf16 at run time"
        )
    if precision == "bf16" and format == "onnx" and check:
        raise UserError("ONNX Runtime cannot run bf16 on a CPU: leave out the comparison with --no-check")
    if device.type != "cpu" and format in ("onnx", "openvino"):
        raise UserError(f"device must be cpu for {format}, whose runtime chooses the device, got {device}")
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError("aoti needs a C++ compiler, and there is none; CXX names one") from None


def export_model(
    model: Autoencoder,
    folder: Path,
    format: Format,
    precision: str = "fp32",
    opset: int = OPSET,
    device: torch.device | str = "cpu",
) -> dict[Part, Path]:
    """Writes an autoencoder's encoder and decoder for another runtime.

    The batch size, height and width are dynamic; with ``aggregator="vit"`` the encoder's height and width are
    those that the model takes. Self-modulated convolutions are folded to plain ones, and the operators of
    `litevae_kernels` are replaced by standard ones. The encoder gives the moments (N, 2 latent_channels, H / f,
    W / f), whose first half is the mean and the mode of the posterior; the second is the log-variance, which
    diffusers clamps to [-30, 20] before sampling.

    Args:
        model: a LiteVAE or AutoencoderKL. It stays unchanged.
        folder: folder to write to, which must exist.
        format: "onnx"; "torch-export" (`torch.export.save`); "aoti" (`torch._inductor.aoti_compile_and_package`,
            compiled for this machine's kind of device); or "openvino" (IR).
        precision: "fp32", "bf16" or "fp16": the dtype of weights, inputs and outputs. For "openvino", inputs and
            outputs are always float32, and "fp16" compresses the weights.
        opset: version of ONNX's operator set, for "onnx" alone.
        device: device of the constants, or that "aoti" compiles for.

    Returns:
        The files, by part.

    Raises:
        UserError: as `check_export` raises it.
    """
    device = torch.device(device)
    check_export(format, precision, device, check=False)
    dtype = torch.float32 if format == "openvino" else DTYPES[precision]
    model = prepare(model, dtype, device)
    files: dict[Part, Path] = {}
    for part, signature in signatures(model).items():
        program = capture(model, part, signature, dtype, device)
        files[part] = folder / f"{part}{SUFFIXES[format][0]}"
        with quietly():
            if format == "onnx":
                write_onnx(program, files[part], signature, opset)
            elif format == "openvino":
                write_openvino(program, files[part], signature, compress=precision == "fp16")
            elif format == "torch-export":
                torch.export.save(program, files[part])
            else:
                torch._inductor.aoti_compile_and_package(program, package_path=str(files[part]))
    return files


def prepare(model: Autoencoder, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """Returns a copy for inference in `dtype` on `device`, with plain convolutions and without tiling."""
    model = model.fold() if isinstance(model, LiteVAE) else copy.deepcopy(model)
    model.disable_tiling()
    model.disable_slicing()
    for block in model.decoder.modules():
        if isinstance(layers := getattr(block, "upsamplers", None), nn.ModuleList):
            block.upsamplers = nn.ModuleList(Enlarge(e) if isinstance(e, Upsample2D) else e for e in layers)
    # The `to` of diffusers would print a notice.
    return nn.Module.to(model.eval().requires_grad_(False), device, dtype)


def capture(
    model: Autoencoder, part: Part, signature: Signature, dtype: torch.dtype, device: torch.device
) -> ExportedProgram:
    """Returns the graph of a part for every batch size and every image size that the model takes."""
    module = Encode(model) if part == "encoder" else Decode(model)
    # The example's sizes differ from each other and from 1, because torch.export would take 1 for a constant.
    example = {"batch": 2, "height": 6, "width": 8}
    dynamic: dict[int, Any] = {}
    shape: list[int] = []
    for axis, size in enumerate(signature.input_shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        factor, _, name = size.rpartition("*")
        dimension = Dim(name, min=1 if name == "batch" else 2)
        dynamic[axis] = int(factor) * dimension if factor else dimension
        shape.append(int(factor or 1) * example[name])
    with torch.no_grad():
        return torch.export.export(
            module,
            (torch.zeros(shape, dtype=dtype, device=device),),
            dynamic_shapes={signature.input: dynamic},
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppresses the notices of exporters that concern their own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            yield
    finally:
        logger.setLevel(level)


def write_onnx(program: ExportedProgram, file: Path, signature: Signature, opset: int) -> None:
    """Writes one ONNX file whose inputs, outputs and dynamic axes have the names of `signature`."""
    axes = {axis: size for axis, size in enumerate(signature.input_shape) if isinstance(size, str)}
    onnx = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[signature.input],
        output_names=[signature.output],
        dynamic_shapes={signature.input: axes},
    )
    assert onnx is not None
    onnx.save(file, external_data=False)


def write_openvino(program: ExportedProgram, file: Path, signature: Signature, compress: bool) -> None:
    """Writes OpenVINO's pair of an .xml and a .bin file."""
    import openvino

    converted = openvino.convert_model(program)
    converted.inputs[0].get_tensor().set_names({signature.input})
    converted.outputs[0].get_tensor().set_names({signature.output})
    openvino.save_model(converted, file, compress_to_fp16=compress)


def load_exported(
    file: Path, format: Format, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Returns a function that runs an exported file, for comparison.

    Args:
        file: file that `export_model` wrote.
        format: its format.
        device: device to run on.

    Returns:
        A function of a tensor in the dtype and with the sizes that the file takes.
    """
    device = torch.device(device)
    if format == "torch-export":
        module = torch.export.load(file).module()
        return lambda x: module(x)
    if format == "aoti":
        compiled = torch._inductor.aoti_load_package(str(file))
        return lambda x: compiled(x.contiguous())  # it reads every input as contiguous
    if format == "openvino":
        import openvino

        # Without the hint, OpenVINO computes in bfloat16 on a CPU that multiplies it.
        run = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda x: torch.from_numpy(run(x.contiguous().numpy())[0].copy())

    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def compare_exported(
    model: Autoencoder,
    files: Mapping[Part, Path],
    format: Format,
    precision: str,
    images: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> dict[Part, float]:
    """Runs exported files and compares them with the model in float32.

    Args:
        model: the model that was exported. It stays unchanged.
        files: what `export_model` returned.
        format, precision, device: arguments of `export_model`.
        images: batches (N, in_channels, H, W) in [-1, 1].

    Returns:
        By part, the largest relative error of a batch: the Euclidean norm of the difference over that of the
        model's output, for moments and images.

    Raises:
        UserError: the runtime does not run a file, or an error exceeds that of `TOLERANCES`.
    """
    device = torch.device(device)
    dtype = torch.float32 if format == "openvino" else DTYPES[precision]
    exact = nn.Module.to(copy.deepcopy(model).eval(), device, torch.float32)
    errors: dict[Part, float] = {}
    for part, file in files.items():
        module = Encode(exact) if part == "encoder" else Decode(exact)
        try:
            run = load_exported(file, format, device)
        except Exception as error:  # each runtime has its own kinds
            raise UserError(f"{file.name}: {format} cannot load it: {one_line(error)}") from None
        errors[part] = 0.0
        for image in images:
            x = image.to(device)
            with torch.no_grad():
                x = x if part == "encoder" else exact.encode(x).latent_dist.mode()
                x = x.to(dtype)
                expected = module(x.float())
            try:
                actual = run(x)
            except Exception as error:
                raise UserError(f"{file.name}: {format} cannot run it: {one_line(error)}") from None
            difference = torch.linalg.vector_norm(actual.float() - expected) / torch.linalg.vector_norm(
                expected
            )
            errors[part] = max(errors[part], float(difference))
        if not errors[part] <= TOLERANCES[precision]:
            raise UserError(
                f"{file.name}: its output is wrong: the relative error is {errors[part]:.2g}, "
                f"and at most {TOLERANCES[precision]:g} is due to {precision}"
            )
    return errors
