import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from litevae.signals import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_is_recorded_and_handlers_are_restored(name):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.Signals[name])
        assert stop.signal == name
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_signal_ends_the_process():
    code = """
import signal
from litevae.signals import StopRequest
with StopRequest():
    signal.raise_signal(signal.SIGTERM)
    print("goes on", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("never", flush=True)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "goes on\n")


def test_another_thread_leaves_the_handlers_alone():
    before, within = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest():
            within.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [before]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="any SIGTERM ends workers on this system")
def test_worker_obeys_its_parent_only():
    code = """
import time
from litevae.signals import obey_parent_only
obey_parent_only(0)
print("ready", flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdout.readline() == "ready\n"
        for name in ("TERM", "INT"):  # sent by another process
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        time.sleep(0.2)
        assert worker.poll() is None
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
