import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from litevae.experiments.trained import Trained, Usage, digest, finished, read_others, write_others
from litevae.training import load_config


def test_a_run_that_stopped_is_not_taken_for_finished(tmp_path):
    path = tmp_path / "metrics.json"
    assert finished(str(tmp_path)) is None
    path.write_text('{"complete": false, "steps": 2, "skipped_steps": 3}')
    assert finished(str(tmp_path)) is None
    path.write_text('{"complete": true, "steps": 2}')
    assert finished(str(tmp_path))["steps"] == 2


def test_runs_are_shared_by_what_decides_their_outcome(tmp_path):
    config = load_config("demo")
    same = replace(config, output_dir="elsewhere", tracker="wandb", data=replace(config.data, workers=7))
    assert digest(config, tmp_path) == digest(same, tmp_path)
    for other in ("seed=1", "loss.kl=0.1", "model.latent_channels=4", "validate_every=3"):
        assert digest(load_config("demo", [other]), tmp_path) != digest(config, tmp_path)


def test_runs_are_found_again_after_their_folder_has_moved(tmp_path):
    def run(output, train):
        config = load_config("demo")
        images = replace(config.data, train=str(train), validation=str(output / "images" / "squares"))
        weights = dict.fromkeys(("init", "init_decoder", "teacher", "teacher_latents"), str(output / "runs"))
        return digest(replace(config, data=images, **weights), output)

    own, others = tmp_path / "own", tmp_path / "others"
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (own, others, before / "images" / "squares", before / "runs"):
        folder.mkdir(parents=True)
    first, second = run(before, own), run(before, others)
    before.rename(after)
    assert run(after, own) == first
    assert run(after, others) == second
    assert first != second


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the processors' time is read from /proc")
def test_the_work_of_others_is_measured_and_that_of_the_run_is_not():
    usage, clock = Usage(), time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"],
        stdout=subprocess.DEVNULL,
    )
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken its time yet

    def seconds():
        return usage.others() * (time.monotonic() - clock) * os.cpu_count()

    as_another = seconds()
    child.wait()
    as_a_part_of_this_run = seconds()
    assert as_another > 0.25
    assert as_another - as_a_part_of_this_run > 0.2  # whatever else the machine does


def test_a_run_counts_as_alone_only_if_that_was_measured(tmp_path):
    assert read_others(tmp_path) is None
    for others, alone in ((0.01, True), (0.2, False), (None, False)):
        write_others(tmp_path, others)
        assert read_others(tmp_path) == others
        assert Trained(load_config("demo"), {}, read_others(tmp_path)).alone is alone
