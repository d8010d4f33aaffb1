import json

import pytest

TESTS = ("benchmarks/test_a.py::test_x", "benchmarks/test_a.py::test_y", "benchmarks/test_b.py::test_z")


@pytest.fixture
def save(monkeypatch, tmp_path):
    """Returns a function that saves a run: subjects by benchmark, and all benchmarks of the run's files."""
    from benchmarks import session

    monkeypatch.setattr(session, "RESULTS", tmp_path)
    figures = dict.fromkeys(session.Result.__dataclass_fields__, 1)

    def run(measured, tests=()):
        results = [
            session.Result(**figures | {"subject": subject, "test": test})
            for test, subject in measured.items()
        ]
        session.Session("machine", tests=set(tests), results=results).save()
        rows = json.loads((tmp_path / "machine.json").read_text())["results"]
        return {row["test"]: row["subject"] for row in rows}

    return run


def test_benchmarks_that_were_not_run_keep_their_figures(save):
    save(dict.fromkeys(TESTS, "old"))
    assert save({TESTS[0]: "new"}, TESTS) == {TESTS[0]: "new", TESTS[1]: "old", TESTS[2]: "old"}


def test_a_renamed_subject_is_replaced(save):
    save({TESTS[0]: "4x3x256x256"})
    assert save({TESTS[0]: "2x3x256x256"}) == {TESTS[0]: "2x3x256x256"}


def test_figures_of_deleted_benchmarks_are_dropped(save):
    save({test: test for test in TESTS})
    assert set(save({TESTS[0]: "new"}, TESTS[:1])) == {TESTS[0], TESTS[2]}  # nothing is known about test_b.py


def test_ratios_with_a_bar_or_a_goal_are_named():
    from benchmarks.session import Result

    figures = dict.fromkeys(Result.__dataclass_fields__, None) | {"subject": "decode", "provider": "torch"}
    assert not Result(**figures | {"times_ours": 3.0}).verdicts()
    assert Result(**figures | {"times_ours": 3.0, "bar": 2.5}).verdicts() == [
        "decode: torch: time over ours 3.00, bar 2.5"
    ]
    goal = {"speedup": 1.7, "memory_share": None}
    ours = Result(**figures | {"times_ours": 1.0, "goal": goal, "speedup": 1.5, "memory_share": 0.6})
    assert ours.verdicts() == [
        "decode: torch: images/s over the best rival's 1.50, bar 1.7",
        "decode: torch: peak memory over the best rival's 0.60",
    ]
