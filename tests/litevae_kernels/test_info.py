import types

import pytest

from litevae_kernels import backend, info, use_backend
from litevae_kernels.conv3x3 import describe_backend
from litevae_kernels.core_interface import OPERATORS

WITHOUT_CONV3X3 = ("haar", "group_norm_silu", "smc")


def test_report():
    rows = dict(info.report())
    assert backend.core is not None
    assert rows["CPU instruction set"].split()[0] == backend.core.isa()
    if backend.cuda_built:
        assert backend.core.cuda_version in rows["CUDA kernels"]
        assert backend.core.cuda_architectures.split()
    else:
        assert rows["CUDA kernels"] == f"not built: {backend.core.cuda_reason}"
        assert backend.core.cuda_reason


def test_a_lowered_instruction_set_is_shown(isa):
    best = backend.core.isas[-1]
    lowered = f"{isa}   (this CPU has {best}; LITEVAE_CPU_ISA lowers it)"
    assert dict(info.report())["CPU instruction set"] == (isa if isa == best else lowered)


def test_every_operator_and_dtype_has_one_row():
    rows = info.served()
    names = [str(dtype).removeprefix("torch.") for dtype in info.DTYPES]
    for device_type in info.DEVICES:
        for operator in OPERATORS:
            found = [row[2] for row in rows if row[:2] == (device_type, operator)]
            assert found == ["all"] or sorted(", ".join(found).split(", ")) == sorted(names)
    for operator in WITHOUT_CONV3X3:
        assert ("cpu", operator, "all", "native") in rows
    assert len(rows) == len(set(rows))


def test_an_operator_describes_its_own_backend():
    described = {row[2]: row[3] for row in info.served() if row[:2] == ("cpu", "conv3x3")}
    for dtype in info.DTYPES:
        name = str(dtype).removeprefix("torch.")
        (row,) = [text for names, text in described.items() if names == "all" or name in names.split(", ")]
        assert row == describe_backend("cpu", dtype)
    assert ("cuda", "conv3x3", "all", "PyTorch's convolution") in info.served()


def test_dtypes_that_agree_share_a_row(monkeypatch):
    package = types.SimpleNamespace(
        describe_backend=lambda device_type, dtype: "wide" if dtype.itemsize > 2 else "half"
    )
    monkeypatch.setattr(info.importlib, "import_module", lambda name: package)
    assert info.served()[:2] == [
        ("cpu", OPERATORS[0], "float32, float64", "wide"),
        ("cpu", OPERATORS[0], "bfloat16, float16", "half"),
    ]


def test_a_table_does_not_repeat_itself(capsys):
    info.print_table(
        [("cpu", "haar", "native"), ("cpu", "smc", "native"), ("cpu", "smc", "x"), ("cuda", "smc", "x")]
    )
    assert capsys.readouterr().out.splitlines() == [
        "cpu   haar  native",
        "      smc   native",
        "            x",
        "cuda  smc   x",
    ]


def test_report_of_a_forced_backend():
    with use_backend("reference"):
        rows = info.served()
    assert {row[3] for row in rows if row[0] == "cpu"} == {"reference", "PyTorch's convolution"}
    with use_backend("triton"):
        (served,) = {row[3] for row in info.served() if row[:2] == ("cpu", "haar")}
    assert served.startswith("triton" if backend.triton_interpreted else "none, because triton is forced")


def test_report_without_a_core(monkeypatch):
    monkeypatch.setattr(info, "core", None)
    monkeypatch.setattr(backend, "core", None)
    monkeypatch.setattr(backend, "core_error", "gone")
    backend._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        rows = info.served()
    assert dict(info.report())["core"] == "not loaded: gone"
    assert dict(info.reasons())["cpu, not native"].startswith("the compiled core did not load (gone)")
    assert all(("cpu", operator, "all", "reference") in rows for operator in WITHOUT_CONV3X3)
