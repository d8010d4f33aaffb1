import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import litevae_kernels
from litevae_kernels import (
    backend,
    group_norm_silu,
    haar_dwt2d,
    modulate_weight,
    self_modulated_conv2d,
    use_backend,
)
from litevae_kernels.haar import reference


def test_the_core_is_built():
    assert backend.core is not None, backend.core_error
    assert backend.choose("cpu") == "native"


def test_use_backend_forces_and_restores(monkeypatch):
    calls = []
    original = reference.analysis
    monkeypatch.setattr(reference, "analysis", lambda *a: calls.append(1) or original(*a))
    image = torch.zeros(1, 1, 4, 4)
    with use_backend("reference"):
        haar_dwt2d(image)
        with use_backend("native"):
            haar_dwt2d(image)
    haar_dwt2d(image)
    assert len(calls) == 1

    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert backend.choose("cpu") == "native"


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend is 'cuda'; allowed: reference, native, triton"),
        use_backend("cuda"),
    ):
        pass


@pytest.mark.skipif(backend.triton_interpreted, reason="the interpreter runs Triton on the CPU")
def test_a_forced_backend_that_cannot_serve_says_why():
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' cannot serve a cpu tensor: Triton"),
    ):
        haar_dwt2d(torch.zeros(1, 1, 4, 4))


def test_devices_without_kernels_use_the_reference():
    out = haar_dwt2d(torch.zeros(1, 3, 5, 4, device="meta"))
    assert out.shape == (1, 12, 3, 2)
    assert out.device.type == "meta"
    with use_backend("native"), pytest.raises(RuntimeError, match="does not support device 'meta'"):
        haar_dwt2d(torch.zeros(1, 3, 5, 4, device="meta"))


OPERATORS = {
    "haar": lambda x: haar_dwt2d(x),
    "group_norm_silu": lambda x: group_norm_silu(x, 2),
    "modulate_weight": lambda x: modulate_weight(x, x[0, :, 0, 0]),
    "self_modulated_conv2d": lambda x: self_modulated_conv2d(x, x, x[0, :, 0, 0]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_asks_for_the_backend(monkeypatch, name):
    asked = []
    for module in ("haar", "group_norm_silu", "smc"):
        package = sys.modules[f"litevae_kernels.{module}"]
        choose = package.choose
        monkeypatch.setattr(package, "choose", lambda kind, choose=choose: asked.append(kind) or choose(kind))
    with use_backend("reference"):
        expected = OPERATORS[name](torch.randn(2, 4, 6, 6))
    assert expected.isfinite().all()
    assert asked == ["cpu"]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_runs_where_no_kernel_is(name):
    x = torch.zeros(2, 4, 6, 6, device="meta")
    with use_backend("native"), pytest.raises(RuntimeError, match="does not support device 'meta'"):
        OPERATORS[name](x)
    out = OPERATORS[name](x)
    assert out.device.type == "meta"
    assert out.shape == OPERATORS[name](torch.ones(2, 4, 6, 6)).shape


@pytest.mark.skipif(backend.triton_interpreted, reason="the interpreter runs Triton on the CPU")
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_says_why_a_forced_backend_cannot_serve(name):
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve a cpu tensor"):
        OPERATORS[name](torch.zeros(2, 4, 6, 6))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_runs_under_the_transforms_of_torch_func(monkeypatch, name):
    operator, x = OPERATORS[name], torch.randn(3, 2, 4, 6, 6)
    backend._warn_transform.cache_clear()
    with pytest.warns(RuntimeWarning, match="serves the transforms of torch.func with plain PyTorch"):
        mapped = torch.func.vmap(operator)(x)
    torch.testing.assert_close(mapped, torch.stack([operator(each) for each in x]))

    def loss(x):
        return operator(x).square().mean()

    one = x[0].requires_grad_()
    (expected,) = torch.autograd.grad(loss(one), one)
    torch.testing.assert_close(torch.func.grad(loss)(x[0].detach()), expected)
    _, tangent = torch.func.jvp(loss, (x[0].detach(),), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-5)
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match=r"'native' cannot serve the transforms .*reference"),
    ):
        torch.func.vmap(operator)(x)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_exports_to_pytorchs_own(name):
    class Model(torch.nn.Module):
        def forward(self, x):
            return OPERATORS[name](x)

    x = torch.randn(2, 4, 6, 6)
    for strict in (False, True):
        exported = torch.export.export(Model(), (x,), strict=strict)
        assert "litevae" not in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), OPERATORS[name](x))
    with use_backend("native"):
        assert "litevae" in str(torch.export.export(Model(), (x,), strict=False).graph)


def test_a_missing_core_warns_once(monkeypatch):
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "no such file")
    backend._warn_slow.cache_clear()
    image = torch.zeros(1, 1, 4, 4)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch, several times slower.*no such file"):
        haar_dwt2d(image)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        haar_dwt2d(image)


def test_threads_do_not_see_each_other():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def other():
        with use_backend("reference"):
            inside.set()
            done.wait(10)
            seen.append(backend.choose("cpu"))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert backend.choose("cpu") == "native"
    with use_backend("native"):
        done.set()
        thread.join()
    assert seen == ["reference"]
    assert backend.choose("cpu") == "native"


def test_a_function_that_keeps_its_backend_runs_on_it_in_another_thread(monkeypatch):
    calls = []
    original = reference.analysis
    monkeypatch.setattr(reference, "analysis", lambda *a: calls.append(1) or original(*a))
    image = torch.zeros(1, 1, 4, 4)
    assert backend.keep_backend(haar_dwt2d) is haar_dwt2d  # nothing is forced
    with use_backend("reference"):
        kept = backend.keep_backend(haar_dwt2d)
    results = []
    for function in (kept, haar_dwt2d):
        thread = threading.Thread(target=lambda function=function: results.append(function(image)))
        thread.start()
        thread.join()
    assert torch.equal(*results)
    assert len(calls) == 1


def test_a_compiled_function_follows_the_choice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(haar_dwt2d, fullgraph=True, backend=counter)
    image = torch.randn(1, 1, 4, 4)
    for name, graphs in [("native", 1), ("reference", 2), ("native", 2), ("reference", 2)]:
        with use_backend(name):
            torch.testing.assert_close(compiled(image), haar_dwt2d(image))
        assert counter.frame_count == graphs  # one per choice; a choice that was made before has its graph
    targets = [" ".join(str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]
    assert ["litevae.haar_analysis" in names for names in targets] == [True, False]


@pytest.fixture
def with_gpu(monkeypatch):
    """Returns a function that simulates a core built with CUDA, a GPU and its driver."""

    def simulate(capability, architectures="80 90 PTX-80", toolkit="13.0.88", driver=(13, 0)):
        core = types.SimpleNamespace(cuda_version=toolkit, cuda_architectures=architectures, cuda_reason="")
        monkeypatch.setattr(backend, "core", core)
        monkeypatch.setattr(backend, "cuda_built", True)
        monkeypatch.setattr(backend, "triton_installed", True)
        monkeypatch.setattr(backend, "_driver_version", lambda: driver)
        answers = {"is_available": True, "device_count": 1, "get_device_capability": capability}
        # The real functions are not traced by the compiler either.
        cuda = types.SimpleNamespace(
            **{name: torch.compiler.disable(lambda *_, value=value: value) for name, value in answers.items()}
        )
        # Only this module gets the substitute, because the compiler looks for GPUs as well.
        rest = {name: getattr(torch, name) for name in ("compiler", "jit", "_C")}
        monkeypatch.setattr(backend, "torch", types.SimpleNamespace(cuda=cuda, **rest))
        backend._find_why_no_cuda.cache_clear()

    yield simulate
    backend._find_why_no_cuda.cache_clear()


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "triton"), ((8, 0), "native"), ((12, 1), "native")]
)
def test_gpus_older_than_the_kernels_get_triton(with_gpu, capability, chosen):
    with_gpu(capability)
    torch._dynamo.reset()
    assert backend.choose("cuda") == chosen
    compiled = torch.compile(lambda x: (x, backend.choose("cuda")), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))[1] == chosen
    if chosen == "triton":
        assert backend.why_not("native", "cuda") == (
            "the core was built for 80, 90, PTX-80, and GPU 0 is sm_75"
        )


@pytest.mark.parametrize(
    ("architectures", "serves", "refuses"),
    [
        ("90a PTX-90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("100f PTX-100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("103f PTX-103f", [(10, 3)], [(10, 0)]),
        ("80 90a PTX-80", [(8, 6), (9, 0), (10, 0)], [(7, 5)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
    ],
)
def test_code_for_one_architecture_serves_no_other(with_gpu, architectures, serves, refuses):
    for capability in serves + refuses:
        with_gpu(capability, architectures)
        assert backend.choose("cuda") == ("native" if capability in serves else "triton"), capability
    major, minor = refuses[-1]
    assert backend.why_not("native", "cuda") == (
        f"the core was built for {architectures.replace(' ', ', ')}, and GPU 0 is sm_{major}{minor}"
    )


def test_a_driver_older_than_the_core_gets_triton(with_gpu):
    with_gpu((9, 0), driver=(12, 8))  # driver 570
    assert backend.choose("cuda") == "triton"
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match=r"by CUDA 13\.0\.88, and the GPU driver supports CUDA 12\.8$"),
    ):
        backend.choose("cuda")
    # Machine code runs on every driver of the major version, but an older one does not compile newer PTX.
    for capability, chosen in (((9, 0), "native"), ((12, 0), "triton")):
        with_gpu(capability, toolkit="13.2", driver=(13, 0))
        assert backend.choose("cuda") == chosen
    assert backend.why_not("native", "cuda").endswith("GPU 0 is sm_120 with a driver for CUDA 13.0")


def test_the_driver_s_version(monkeypatch):
    class Driver:
        def __init__(self, name):
            assert "cuda" in name

        def cuDriverGetVersion(self, at):
            at._obj.value = 12080
            return 0

    monkeypatch.setattr(backend.ctypes, "CDLL", Driver)
    assert backend._driver_version() == (12, 8)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert backend._driver_version() == (0, 0)


def test_a_core_of_another_version_is_refused():
    code = """
import sys, types
sys.modules["litevae_core"] = types.SimpleNamespace(interface=-1)
from litevae_kernels import backend
print(backend.core, backend.why_not("native", "cpu"))
"""
    assert "None the compiled core did not load (it was built from another version" in run(code).stdout
    code = code.replace("interface=-1", f"interface={backend.INTERFACE}, operators=('haar', 'new')")
    message = "it was built from another version of the sources (operators haar, new; not haar, group_norm_silu, smc"
    assert message in run(code).stdout


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(litevae_kernels.__file__)),
        check=False,
    )


def test_environment_variable():
    code = "from litevae_kernels import backend; print(backend.choose('cpu'), backend.core.isa())"
    chosen = run(code, LITEVAE_BACKEND="reference", LITEVAE_CPU_ISA="baseline")
    assert chosen.stdout.split() == ["reference", "baseline"]
    best = backend.core.isas[-1]
    assert run(code, LITEVAE_CPU_ISA="").stdout.split() == ["native", best]
    wrong = run(code, LITEVAE_BACKEND="fast")
    assert wrong.returncode != 0
    assert "LITEVAE_BACKEND is 'fast'; allowed: reference, native, triton" in wrong.stderr


@pytest.mark.parametrize("name", ["avx512bf16", "neon", "AVX2", "x" * 1000])
def test_an_instruction_set_that_the_cpu_lacks(monkeypatch, name):
    used = []
    core = types.SimpleNamespace(isas=("baseline", "avx2", "avx512"), set_isa=used.append)
    monkeypatch.setattr(backend, "core", core)
    backend._lower_isa("avx2")
    backend._lower_isa(None)
    with pytest.raises(ValueError, match="LITEVAE_CPU_ISA is ") as caught:
        backend._lower_isa(name)
    message = "; allowed on this CPU, which has avx512: baseline, avx2, avx512"
    assert str(caught.value) == f"LITEVAE_CPU_ISA is {name[:40]!r}{message}"
    assert used == ["avx2"]
