import pytest

from litevae.cli.experiment import pairs
from litevae.errors import UserError
from litevae.experiments.spec import load_experiment, shipped_experiments


def test_list_prints_every_experiment_with_its_title(litevae):
    lines = litevae("experiment", "list").splitlines()
    assert lines == [f"{name}  {load_experiment(name).title}" for name in shipped_experiments()]
    assert len(lines) == 33  # the paper's 30, and three of ours


def test_unknown_names_and_scales_are_one_line(fails, tmp_path):
    assert "did you mean 'table09'?" in fails("experiment", "tabel09", "-o", tmp_path)
    assert "--scale huge: must be one of paper, small, tiny" in fails(
        "experiment", "table09", "--scale", "huge"
    )


def test_data_sets_are_paired_with_their_folders():
    assert pairs("--data", ["imagenet=a=b", "ffhq=c"]) == {"imagenet": "a=b", "ffhq": "c"}
    assert pairs("--data", None) == {}


@pytest.mark.parametrize("value", ["imagenet", "=path", "imagenet="])
def test_a_pair_needs_both_sides(value):
    with pytest.raises(UserError, match=f"--data {value}: write SET=PATH"):
        pairs("--data", [value])
