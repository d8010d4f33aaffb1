import re
from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf

from litevae import settings
from litevae.cli import main
from litevae.cli.config import as_yaml, list_commands, sections
from litevae.diffusion.config import DiffusionConfig, shipped_diffusion_configs
from litevae.training.config import Config, load_config, shipped_configs


@pytest.fixture
def show(capsys):
    """Runs `litevae config`, and returns what it printed."""

    def run(*arguments):
        status = main(["config", *map(str, arguments)])
        output, errors = capsys.readouterr()
        assert status == 0, errors
        assert max(map(len, output.splitlines())) <= 110
        return output

    return run


@pytest.fixture
def fails(capsys):
    """Runs `litevae config` with a mistake, and returns the one line of the error."""

    def run(*arguments):
        assert main(["config", *map(str, arguments)]) == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.count("\n") == 1
        return errors

    return run


def all_sections(schema):
    return [section for _, _, section, _ in sections(schema(), schema())]


def in_one_line(output, name):
    """Returns the row of a setting with its wrapped lines joined."""
    row = re.search(rf"^  {name} .*\n(?:   .*\n)*", output + "\n", re.MULTILINE)
    return " ".join(row.group().split())


@pytest.mark.parametrize(("schema", "count"), [(Config, 9), (DiffusionConfig, 8)])
def test_every_setting_has_a_meaning_and_a_default_in_its_range(schema, count):
    settings.check_ranges(schema())
    found = all_sections(schema)
    assert len(found) == count
    for section in found:
        assert type(section).__doc__
        assert not type(section).__doc__.startswith(
            f"{type(section).__name__}("
        )  # dataclass writes this itself
        for entry in fields(section):
            assert re.fullmatch(r"[A-Za-z].*\.", entry.metadata["meaning"]), entry.name


@pytest.mark.parametrize("schema", [Config, DiffusionConfig])
def test_every_number_has_a_range(schema):
    for section in all_sections(schema):
        for entry in fields(section):
            value = getattr(section, entry.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
                assert str(entry.metadata["limits"]), entry.name


@pytest.mark.parametrize("name", [*shipped_configs(), *shipped_diffusion_configs()])
def test_every_setting_is_shown(show, name):
    output = show(name)
    training = name in shipped_configs()
    assert output.startswith(f"litevae train{'' if training else '-diffusion'} {name}: ")
    for key, _, section, _ in sections(*2 * [(Config if training else DiffusionConfig)()]):
        part = output.split(f"\n\n{key}: ")[1].split("\n\n")[0] if key and "[" not in key else output
        for entry in fields(section):
            if not is_dataclass(getattr(section, entry.name)):
                assert re.search(rf"^  {entry.name} ", part, re.MULTILINE)
                assert entry.metadata["meaning"].split()[0] in in_one_line(part, entry.name)


def test_a_row_has_value_default_range_and_meaning(show):
    output = show("demo", "seed=7")
    assert in_one_line(output, "seed") == (
        "seed 7 0 to 4294967295 Seed of the random number (default 0) generators."
    )
    assert in_one_line(output, "precision") == (
        "precision auto auto or fp32 or bf16 Data type of autocast; weights stay or fp16 in float32. auto: bf16 where "
        "the hardware multiplies it, otherwise fp32; a resumed run keeps the precision of its checkpoint."
    )
    assert in_one_line(output, "channels_last").startswith("channels_last true true or false Keep ")
    assert in_one_line(output, "block_out_channels").startswith(
        "block_out_channels [32, 32, 64, 64] list, each 1 or "
    )
    assert in_one_line(output, "encoder_block_out_channels").startswith(
        "encoder_block_out_channels [] list, each "
    )
    assert in_one_line(output, "init").startswith('init "" text Folder ')
    assert "stages[0], if given: " in output


def test_stages_are_sections(show):
    output = show(
        "imagenet-b-tuned", "stages=[{start: 5, size: 64},{start: 9, batch_size: 8}]", "max_steps=20"
    )
    assert re.search(r"stages\[0\]: .*\n  start +5 ", output)
    assert re.search(r"stages\[1\]: .*\n  start +9 ", output)
    assert "if given" not in output


def test_list_has_each_configuration_with_its_comment(show):
    lines = show().splitlines()
    assert lines[0] == "litevae train NAME (autoencoders):"
    assert "litevae train-diffusion NAME (diffusion models):" in lines
    for name in (*shipped_configs(), *shipped_diffusion_configs()):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3
        assert not line.endswith((".", ",", ":"))
    assert [line.split()[0] for line in show("--diffusion").splitlines()[1:]] == shipped_diffusion_configs()


def test_a_file_is_shown(show, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\nmax_steps: 3\n")
    output = show(path)
    assert output.startswith(f"litevae train {path}\n")
    assert in_one_line(output, "max_steps").startswith("max_steps 3 ")
    path.write_text("# Mine\nextends: small\nunet:\n  dropout: 0.25\n")
    output = show(path, "--diffusion")
    assert output.startswith(f"litevae train-diffusion {path}: Mine\n")
    assert in_one_line(output, "dropout").startswith("dropout 0.25 0 to 0.999 ")


def test_settings_that_do_not_fit_together_are_shown_with_the_reason(show):
    output = show("small", "model=runs/demo")
    assert " ".join(output.split()).endswith(
        "litevae train-diffusion would refuse these settings: give one of data.latents, a folder of litevae encode, "
        "and data.train, images to encode on the fly"
    )
    assert "would refuse" not in show("small", "model=runs/demo", "data.latents=latents")
    assert "would refuse" not in show("demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmeo"], "no configuration named 'dmeo': did you mean 'demo'? (there are: demo, "),
        (["smal"], "did you mean 'small'?"),
        (["demo", "--diffusion"], "no configuration named 'demo': did you mean "),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["demo", "data.size=8"], "data.size must be 16 or more, got 8"),
        (["demo", "max_step=3"], "did you mean 'max_steps'?"),
        (["demo", "--max-steps", "3"], "write key=value"),
        (["small", "max_steps=many"], "max_steps must be a whole number"),
    ],
)
def test_mistake_is_one_line(fails, arguments, message):
    assert message in fails(*arguments)


def test_values_are_written_as_on_the_command_line():
    config = load_config("imagenet-b-tuned", ["optimizer.betas=[0.25,0.5]"])
    for _, _, section, _ in sections(config, Config()):
        for entry in fields(section):
            value = getattr(section, entry.name)
            written = OmegaConf.create(f"value: {as_yaml(value)}").value
            if is_dataclass(value):
                continue
            if isinstance(value, tuple | list) and not any(map(is_dataclass, value)):
                value = list(value)
            elif isinstance(value, list):
                value = [vars(each) for each in value]
            assert written == value


def test_help_of_the_commands_points_here(capsys):
    for command in list_commands():
        assert main([command.name, "--help"]) == 0
        assert "litevae config CONFIG shows every setting" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("setting", ["data.size=100", "model.preset=litevae-x", "data.train="])
def test_settings_that_a_run_would_refuse_at_its_start_are_named(show, setting):
    output = " ".join(show("demo", setting).split())
    assert "litevae train would refuse these settings: " in output
