"""The instruction sets of the benchmarks.

``python -m benchmarks.instruction_sets`` runs the benchmarks once per instruction set of this CPU. Its arguments are
passed on to pytest.
"""

import os
import subprocess
import sys

SETTINGS = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


def settings_of_rivals() -> dict[str, str]:
    """Returns the variables that limit PyTorch and oneDNN to LITEVAE_CPU_ISA, without those that are already set."""
    settings = SETTINGS.get(os.environ.get("LITEVAE_CPU_ISA", ""), {})
    return {name: value for name, value in settings.items() if name not in os.environ}


def main(arguments: list[str]) -> int:
    """Runs the benchmarks with each instruction set, the best one first; returns the largest exit status."""
    from litevae_kernels.backend import core  # not above: oneDNN reads its variable during this import

    statuses = []
    for isa in reversed(core.isas) if core is not None else [""]:
        print(f"LITEVAE_CPU_ISA={isa}", flush=True)
        command = [sys.executable, "-m", "pytest", *(arguments or ["benchmarks/"]), "--benchmark-only"]
        statuses.append(
            subprocess.run(command, env={**os.environ, "LITEVAE_CPU_ISA": isa}, check=False).returncode
        )
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
