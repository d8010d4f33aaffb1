"""Runs commands in this process with a gigabyte of memory more than it has, and prints what became of each.

The arguments are JSON lists, one per command; the result is one JSON list per line, of the exit status, the error and
the seconds.
"""

import contextlib
import importlib
import io
import json
import pkgutil
import resource
import sys
import time
from pathlib import Path

import torch

import litevae
from litevae.cli import main
from litevae.models.build import with_fresh_weights
from litevae.models.config import ModelConfig

torch.set_num_threads(1)
# All imports come before the limit.
for module in pkgutil.walk_packages(litevae.__path__, "litevae."):
    importlib.import_module(module.name)
with_fresh_weights(ModelConfig(block_out_channels=[32, 32], layers_per_block=1), 32)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.argv[1:]:
    start, errors = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(json.loads(line))
    print(json.dumps([status, errors.getvalue(), time.perf_counter() - start]), flush=True)
