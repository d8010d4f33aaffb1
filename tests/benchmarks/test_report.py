"""The report of GPUs, from figures that this file invents and that no GPU has measured."""

import json

import pytest

INVENTED = {"torch": "0.0", "threads": 1, "date": "2000-01-01", "device": "invented GPU", "test": "invented"}


@pytest.fixture
def report(monkeypatch, tmp_path):
    from benchmarks import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return report


def rows(batch):
    """Invented figures: the compiled SD-VAE and the eager LiteVAEs are the faster ones."""
    from benchmarks.gpu import GPU_ENCODERS
    from benchmarks.session import Result

    none = dict.fromkeys(Result.__dataclass_fields__)
    times = {
        "SD-VAE, eager": 20,
        "SD-VAE, torch.compile": 16,
        "LiteVAE-B, eager": 4,
        "LiteVAE-B, torch.compile": 5,
        "LiteVAE-S, eager": 1,
        "LiteVAE-S, torch.compile": 2,
        "copy": 3,
    }
    return [
        none
        | INVENTED
        | {
            "subject": f"{GPU_ENCODERS}, {batch}x3x256x256",
            "provider": provider,
            "median_ms": time,
            "p10_ms": time,
            "p90_ms": time,
            "times_ours": time / 4,
            "images": None if provider == "copy" else batch,
            "peak_memory": 1_000_000 * time,
            "speedup": 16 / time,
        }
        for provider, time in times.items()
    ]


def save(report, **more):
    data = {"device": "invented GPU", "results": [*rows(32), *rows(8)]} | more
    (report.RESULTS / "invented-gpu.json").write_text(json.dumps(data))


def test_the_readme_has_a_row_per_batch(report):
    save(report)
    report.write_readme()
    text = report.README.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    small, large = (line for line in text.splitlines() if line.startswith("| invented GPU"))
    assert small.startswith(
        "| invented GPU, torch 0.0, 2000-01-01 | 8 | 500 (torch.compile) | 2000 (eager) |"
    )
    assert "| 32 | 2000 (torch.compile) | 8000 (eager) | 32000 (eager) | 4.0x | 16, 4, 1 | [JSON](" in large


def test_a_dry_run_is_never_reported(report):
    save(report, dry_run=True)
    report.write_readme()
    assert "invented" not in report.README.read_text()
    assert "invented" not in report.report()


def test_the_report_has_outcomes_and_counters(report):
    steps = {
        "memcheck": {
            "outcome": "failed: exit status 9",
            "seconds": 12.3,
            "expected": 50,
            "date": "2000-01-01",
        },
        "counters": {
            "outcome": "passed",
            "date": "2000-01-01",
            "readings": [
                {"kernel": "Statistics", "issue slots busy": "71 %"},
                {"kernel": "Apply", "time": "9 us"},
            ],
        },
    }
    save(report, validation=steps)
    text = report.report()
    assert "| memcheck | failed: exit status 9 | 12.3 | 50 | 2000-01-01 |" in text
    assert "| Statistics | 71 % |  |" in text
    assert "| Apply |  | 9 us |" in text


def test_the_report_has_what_trainings_logged(report):
    facts = {"steps": 1200, "images per second": 345.6, "first loss": 1.25, "last loss": 0.5}
    step = {"outcome": "passed", "date": "2000-01-01"}
    save(
        report,
        validation={
            "train, 128": step | {"training": facts | {"not finite": []}},
            "train, 256": step
            | {"training": dict.fromkeys(facts) | {"not finite": ["step 3: a", "step 4: b"]}},
        },
    )
    text = report.report()
    assert "| train, 128 | 1200 | 346 | 1.25 | 0.5 | none |" in text
    assert "| train, 256 |  |  |  |  | step 3: a; step 4: b |" in text


def test_the_readme_says_where_the_cuda_kernels_were_not_built(report):
    """That is so of a row, whatever the last build has come to."""
    save(report, results=[row | {"cuda_kernels": False} for row in rows(8)] + rows(32))
    report.write_readme()
    text = report.README.read_text()
    assert "| invented GPU without the CUDA kernels, torch 0.0, 2000-01-01 | 8 |" in text
    assert "| invented GPU, torch 0.0, 2000-01-01 | 32 |" in text
