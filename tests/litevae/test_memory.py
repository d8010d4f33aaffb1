import re
import resource
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from litevae.errors import UserError
from litevae.memory import check_batch, check_memory, explain_out_of_memory, format_bytes, total_memory


def test_a_request_beyond_the_memory_names_both():
    check_memory(total_memory(), "x")
    with pytest.raises(UserError, match=r"^x: at least 16 EiB of memory needed, [\d.]+ \wiB there$"):
        check_memory(2**64, "x")


def test_a_batch_is_checked_on_the_cpu_only():
    check_batch(10**9, 10**4, 64, "cuda")
    with pytest.raises(
        UserError, match=r"data\.batch_size: 1000000000 of 10000 x 10000 pixels at a time: at least"
    ):
        check_batch(10**9, 10**4, 64, "cpu")


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (lambda: torch.empty(10**15), r"3\.553 PiB at once"),
        (lambda: torch.empty(*[10**6] * 4), r"a tensor of \[1000000, 1000000, 1000000, 1000000\] at once"),
        (lambda: np.empty(10**16), r"71\.1 PiB at once"),
        (lambda: bytearray(10**16), "more memory than there is"),
    ],
)
def test_failed_allocations_are_explained(allocate, asked):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    message = explain_out_of_memory(caught.value) or ""
    assert message.startswith("out of memory: asked for ")
    assert re.search(asked, message), message
    assert "are free" in message


def test_other_errors_are_not_explained():
    assert explain_out_of_memory(RuntimeError("shapes differ")) is None
    assert explain_out_of_memory(ValueError("sizes=[1]")) is None


def test_the_message_of_a_gpu_is_kept():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2 GiB. 1 GiB is free. If reserved but ..."
    )
    assert explain_out_of_memory(error) == (
        "CUDA out of memory. Tried to allocate 2 GiB. 1 GiB is free: use smaller batches, images or widths"
    )


def test_a_limit_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12345, 12345))
    assert total_memory() == 12345


def test_a_limit_of_the_process_counts_as_free_what_is_not_reserved(monkeypatch):
    reserved = psutil.Process().memory_info().vms
    limit = reserved + 2**20
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(vms=reserved))
    total = format_bytes(min(limit, total_memory()))
    assert f"; 1 MiB of {total} are free: " in explain_out_of_memory(MemoryError())


def test_bytes_are_printed_in_the_largest_unit():
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**40)] == ["0 bytes", "1023 bytes", "1.5 KiB", "1 TiB"]


def test_an_allocation_that_failed_is_explained_without_any_memory(monkeypatch):
    def fail():
        raise MemoryError

    monkeypatch.setattr("psutil.virtual_memory", fail)
    message = "out of memory: asked for more memory than there is: use smaller batches, images or widths"
    assert explain_out_of_memory(MemoryError()) == message
