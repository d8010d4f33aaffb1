"""Generated YAML files and KEY=VALUE arguments."""

from dataclasses import asdict

import pytest
from hypothesis import strategies as st
from omegaconf import OmegaConf

from litevae.diffusion.config import DiffusionConfig
from litevae.experiments.spec import FOLDER, load_experiment
from litevae.settings import all_keys
from litevae.training.config import Config

EACH = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "long"])


@EACH
@pytest.mark.parametrize(("schema", "options"), [(Config, ()), (DiffusionConfig, ("--diffusion",))])
def test_any_yaml_file(explore, command, broken_yaml, tmp_path, schema, options, long):
    document = {"extends": "demo" if schema is Config else "small", **asdict(schema())}
    if schema is Config:
        document["stages"] = [{"start": 11, "size": 64, "batch_size": None}]

    def check(content):
        (tmp_path / "x.yaml").write_bytes(content)
        command("config", "x.yaml", *options)

    explore(broken_yaml(document), check, 40, long)


@EACH
def test_any_argument(explore, command, texts, long):
    keys = st.one_of(st.sampled_from([key for key, _ in all_keys(Config)]), texts)

    def check(arguments):
        command("config", "demo", *(f"{key}={value}" for key, value in arguments))

    explore(st.lists(st.tuples(keys, texts), min_size=1, max_size=3), check, 40, long)


@EACH
def test_any_experiment(explore, ends_well, broken_yaml, tmp_path, long):
    document = OmegaConf.to_container(OmegaConf.load(FOLDER / "table09.yaml"))

    def check(content):
        (tmp_path / "x.yaml").write_bytes(content)
        ends_well(load_experiment, "x.yaml")

    explore(broken_yaml(document), check, 50, long)
