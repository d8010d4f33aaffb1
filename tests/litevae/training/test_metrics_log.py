"""The log of a run: its lines, its speed and the text of the progress bar."""

import json
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from litevae.training import metrics_log
from litevae.training.metrics_log import MetricsLog, estimate_end, format_progress, read_log


@pytest.fixture
def accelerator():
    """A stand-in for an Accelerator that keeps in `tracked` what is sent to the trackers."""
    tracked = []
    return SimpleNamespace(
        is_main_process=True, tracked=tracked, log=lambda values, step: tracked.append((step, values))
    )


@pytest.fixture
def clock(monkeypatch):
    """The clock of the log, which stands still until a test sets `seconds`."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: clock.seconds)
    return clock


def saved(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_in_the_file_at_once(tmp_path, accelerator, clock):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, [{"step": 1, "loss": 3.0}], accelerator) as log:
        clock.seconds = 2.0
        log.count(8, 0.5)
        line = log.write(2, {"loss": 2.0}, skipped=0)
        assert line == {
            "step": 2,
            "loss": 2.0,
            "skipped_steps": 0,
            "images_per_second": 4.0,
            "data_wait": 0.25,
        }
        assert saved(path) == log.lines == [{"step": 1, "loss": 3.0}, line]
        log.write_skipped(3, "the loss is nan", skipped=1)
        assert saved(path)[2] == {"step": 3, "skipped": "the loss is nan", "skipped_steps": 1}
    assert accelerator.tracked == [(2, {"loss": 2.0, "images_per_second": 4.0, "data_wait": 0.25}), (3, {})]


def test_only_the_main_process_writes(tmp_path, accelerator, clock):
    accelerator.is_main_process = False
    with MetricsLog(tmp_path / "metrics.jsonl", [], accelerator) as log:
        log.write_skipped(1, "the loss is nan", skipped=1)
    assert [line["step"] for line in log.lines] == [1]
    assert accelerator.tracked == []
    assert not (tmp_path / "metrics.jsonl").exists()


def test_speed_leaves_out_validating_and_saving(tmp_path, accelerator, clock):
    with MetricsLog(tmp_path / "metrics.jsonl", [], accelerator) as log:
        clock.seconds = 2.0
        log.count(8, 0.5)
        clock.seconds = 12.0  # validation
        log.restart()
        clock.seconds = 14.0
        log.count(8, 1.5)
        line = log.write(2, {}, skipped=0)
        assert (line["images_per_second"], line["data_wait"]) == (4.0, 0.5)
        log.restart()
        clock.seconds = 15.0  # the next line counts from the previous one
        log.count(8, 3.0)
        line = log.write(3, {}, skipped=0)
        assert (line["images_per_second"], line["data_wait"]) == (8.0, 1.0)


def test_a_resumed_run_drops_a_cut_last_line_and_later_steps(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert read_log(path, 9) == lines
    with MetricsLog(path, read_log(path, 2), accelerator):
        assert saved(path) == lines[:2]


def test_a_run_without_a_log_has_no_lines(tmp_path):
    assert read_log(tmp_path / "metrics.jsonl", 9) == []


def test_progress_bar_shows_the_unweighted_losses_and_the_speed():
    line = {
        "step": 7,
        "loss": 0.123456,
        "l1": 0.1,
        "weighted/l1": 0.2,
        "adversarial": -1.5,
        "gradient_norm": 2.0,
        "discriminator_gradient_norm": 3.0,
        "gradient_ratio": 0.5,
        "learning_rate": 1e-4,
        "skipped_steps": 0,
        "images_per_second": 12.3,
        "data_wait": 0.256,
    }
    text = "loss 0.123, l1 0.1, adversarial -1.5, 12 images/s, 26% waiting for data"
    assert format_progress(line) == text


def test_the_end_is_estimated_from_the_mean_time_of_a_step():
    before = datetime.now()
    text = estimate_end(3, 10, 3 * 3600.0)
    expected = {f"ends {now + timedelta(hours=7):%Y-%m-%d %H:%M}" for now in (before, datetime.now())}
    assert text in expected
