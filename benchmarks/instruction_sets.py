"""The environment variables that limit the rivals to the instruction set that LITEVAE_CPU_ISA names."""

import os

SETTINGS = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


def settings_of_rivals() -> dict[str, str]:
    """Returns the variables for PyTorch and oneDNN that are not set yet."""
    settings = SETTINGS.get(os.environ.get("LITEVAE_CPU_ISA", ""), {})
    return {name: value for name, value in settings.items() if name not in os.environ}
