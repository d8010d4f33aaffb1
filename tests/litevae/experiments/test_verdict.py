import pytest

from litevae.experiments.spec import Claim, RunSpec
from litevae.experiments.trained import Row
from litevae.experiments.verdict import join_words


@pytest.mark.parametrize(
    ("better", "than", "verdict"),
    [
        ([21.0], [20.0], "PSNR +1, no verdict from one seed"),
        ([20.0], [21.0], "PSNR -1, no verdict from one seed"),
        # Paired differences 1, 2, 3: mean 2; standard error 1/sqrt(3) times Student's 4.303 is 2.48.
        ([21.0, 22.0, 23.0], [20.0, 20.0, 20.0], "PSNR +2 ± 2.5, no significant difference"),
        # Paired differences 3, 4, 5: mean 4.
        ([23.0, 24.0, 25.0], [20.0, 20.0, 20.0], "PSNR +4 ± 2.5, shows"),
        ([17.0, 16.0, 15.0], [20.0, 20.0, 20.0], "PSNR -4 ± 2.5, does not show"),
    ],
)
def test_a_claim_shows_or_not(better, than, verdict, report, row):
    claim = Claim(better="A", than="B", text="A helps.", metrics=["psnr"])
    text = report([row("A", better), row("B", than)], [claim])
    assert f"- A helps. {verdict}.\n" in text


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ([20.0], "PSNR +0, no verdict from one seed"),
        ([20.0, 20.01, 20.02], "PSNR +0.01 ± 0.025 (margin 0.1), shows"),
        ([19.95, 19.94, 19.93], "PSNR -0.06 ± 0.025 (margin 0.1), shows"),
        ([19.0, 18.0, 17.0], "PSNR -2 ± 2.5 (margin 0.1), undecided"),  # a noisier comparison is no evidence
        ([15.0, 16.0, 17.0], "PSNR -4 ± 2.5 (margin 0.1), does not show"),
    ],
)
def test_a_claim_to_be_as_good_needs_an_interval_above_the_margin(better, verdict, report, row):
    claim = Claim(better="A", than="B", text="As good.", metrics=["psnr"], at_least=True)
    text = report([row("A", better), row("B", [20.0] * len(better))], [claim])
    assert f"- As good. {verdict}." in text


def test_lower_is_better_for_distances(report, trained):
    def distance(bar):
        rows = [
            Row(
                RunSpec(row=[name]),
                [trained(), trained()],
                [{"sigma 25": value + shift, "± at 25": bar} for shift in (0.0, 0.1)],
                28,
            )
            for name, value in (("A", 1.0), ("B", 3.0))
        ]
        return report(rows, [Claim(better="A", than="B", text="Closer.", metrics=["sigma 25"])])

    assert "- Closer. sigma 25 -2 ± 1.4, shows.\n" in distance(1.0)
    # The measurement's own error bars count: sqrt(2² + 2²) = 2.8.
    assert "- Closer. sigma 25 -2 ± 2.8, no significant difference.\n" in distance(2.0)


@pytest.mark.parametrize(
    ("seconds", "others", "verdict"),
    [
        ([(10.0, 25.0), (10.0, 24.9)], 0.01, "seconds 2.5 ± 0.064 times better, shows"),
        ([(10.0, 15.0), (10.0, 15.1)], 0.01, "seconds 1.5 ± 0.064 times better, does not show"),
        ([(10.0, 21.0), (10.0, 19.0)], 0.01, "seconds 2 ± 1.3 times better, undecided"),
        ([(10.0, 25.0), (10.0, 24.9)], 0.2, "Not judged: the runs did not have the machine to themselves"),
        ([(10.0, 25.0), (10.0, 24.9)], None, "Not judged: the runs did not have the machine to themselves"),
    ],
)
def test_seconds_are_compared_by_their_ratio_if_the_runs_were_alone(
    report, trained, seconds, others, verdict
):
    rows = [
        Row(
            RunSpec(row=[name]),
            [trained(each[i], others=others) for each in seconds],
            [{"seconds": each[i]} for each in seconds],
        )
        for i, name in enumerate("AB")
    ]
    claim = Claim(better="A", than="B", text="Faster.", metrics=["seconds"], factor=2)
    assert f"- Faster. {verdict}.\n" in report(rows, [claim])


def test_a_metric_that_was_not_measured_decides_nothing(report, row):
    claim = Claim(better="A", than="B", text="A is real.", metrics=["rfid"])
    text = report([row("A", [20.0]), row("B", [19.0])], [claim])
    assert "- A is real. Not measured at this scale.\n" in text


def test_at_equal_seconds_the_slower_run_counts_as_it_was_then(report, row, trained):
    history = [
        {"step": step, "psnr": 10.0 + step / 10, "ssim": 0.5, "seconds": 0.4 * step}
        for step in (25, 50, 75, 100)
    ]
    slow = trained(40.0, history=history)
    fast = trained(24.0, history=[{"step": 100, "psnr": 18.0, "ssim": 0.5, "seconds": 24.0}])
    claim = Claim(better="A", than="B", text="Sooner.", metrics=["psnr"], equal_seconds=True, ours=True)
    rows = [row("A", [18.5], runs=[fast]), row("B", [20.0], runs=[slow])]
    text = report(rows, [claim])
    # 18 is compared with 15 of step 50, after 20 of the 40 s.
    assert (
        "Not in the paper:\n\n- Sooner. PSNR +3, no verdict from one seed; B after 50 of its steps.\n" in text
    )
    assert "The paper's statements" not in text
    rows[0].trained[0] = trained(9.0, history=[{"step": 100, "psnr": 18.0, "seconds": 9.0}])
    assert "- Sooner. B was not validated that early.\n" in report(rows, [claim])


@pytest.mark.parametrize(
    ("values", "text"),
    [({2}, "2"), ({3, 1}, "1 and 3"), ({1000, 3, 2}, "2, 3 and 1,000"), ({"b", "a"}, "a and b")],
)
def test_values_are_joined_as_in_a_sentence(values, text):
    assert join_words(values) == text
