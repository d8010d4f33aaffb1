"""OpenVINO and ONNX Runtime, which many would choose for inference on a CPU: ``pip install ".[rivals]"``.

A rival that is not installed is left out with a warning. ONNX Runtime's CPU provider has no bfloat16 convolution, so it
runs in float32 only. OpenVINO follows ``ONEDNN_MAX_CPU_ISA``. ONNX Runtime's instruction set cannot be lowered, so it
is left out where the others run with less than the CPU's AVX-512.
"""

import importlib
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import dtype_name
from litevae_kernels import use_backend
from litevae_kernels.arithmetic import current_isa
from litevae_kernels.backend import core

Call = Callable[[Tensor], Tensor]


def optional(name: str) -> Any:
    """Returns an optional module, or None after a warning."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"{name} is not among the rivals: {error}", stacklevel=2)
        return None


class Exported(nn.Module):
    """A module whose forward pass is `call`, a function of one tensor that runs `model`."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def in_openvino(module: Exported, x: Tensor, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, Call]:
    """Returns float32 functions that OpenVINO computes in each of `dtypes`; none if OpenVINO is not installed."""
    openvino = optional("openvino")
    if openvino is None:
        return {}
    with use_backend("reference"), warnings.catch_warnings(action="ignore"):
        model = openvino.convert_model(module, example_input=x)  # runs the module several times

    def compile_for(dtype: torch.dtype) -> Call:
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(dtype_name(dtype), dtype_name(dtype)),
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        run = openvino.Core().compile_model(model, "CPU", settings)
        return lambda x: torch.from_numpy(run(x.numpy(), share_inputs=True)[0].copy())

    return {dtype: compile_for(dtype) for dtype in dtypes}


def in_onnxruntime(module: Exported, x: Tensor) -> Call | None:
    """Returns a float32 function that ONNX Runtime computes.

    Returns None if it or onnxscript is not installed, or if it would use AVX-512 beside rivals that may not.
    """
    isa = current_isa()
    if core is not None and "avx512" in core.isas and isa in core.isas[: core.isas.index("avx512")]:
        warnings.warn(
            f"onnxruntime is left out: it uses AVX-512, and the other rivals are lowered to {isa}",
            stacklevel=2,
        )
        return None
    onnxruntime = optional("onnxruntime")
    if onnxruntime is None or optional("onnxscript") is None:
        return None
    file = io.BytesIO()
    with use_backend("reference"), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(file)  # type: ignore[union-attr]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads may wait actively for work within a call, and not into the next provider's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
