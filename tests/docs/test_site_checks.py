import logging
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs/site_checks.py"))


def page(markdown, path="training.md"):
    return SimpleNamespace(markdown=markdown, file=SimpleNamespace(src_uri=path))


@pytest.mark.parametrize(
    ("path", "link", "shown"),
    [
        ("training.md", "[recipe](../litevae/configs/demo.yaml)", "recipe (`litevae/configs/demo.yaml`)"),
        ("training.md", "[demo.yaml](../litevae/configs/demo.yaml)", "`litevae/configs/demo.yaml`"),
        ("api/training.md", "[`litevae`](../../litevae)", "`litevae`"),
        ("api/training.md", "[guide](../kernels.md#backends)", "[guide](../kernels.md#backends)"),
        ("training.md", "![picture](../docs/encoder.png)", "![picture](../docs/encoder.png)"),
    ],
)
def test_links_that_leave_docs_become_text(path, link, shown, caplog):
    config = {"docs_dir": str(ROOT / "docs")}
    assert HOOKS["on_page_markdown"](link, page=page(link, path), config=config) == shown
    assert not caplog.records


def test_a_link_to_no_file_is_a_warning(caplog):
    config = {"docs_dir": str(ROOT / "docs")}
    HOOKS["on_page_markdown"]("[recipe](../nowhere.yaml)", page=page(""), config=config)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "training.md links to ../nowhere.yaml" in caplog.text


def test_a_member_that_is_missing_is_a_warning(caplog):
    markdown = "::: litevae.losses\n    options:\n      members: [l1_loss, l3_loss]\n"
    HOOKS["on_page_content"]('<h3 id="litevae.losses.l1_loss">', page=page(markdown))
    assert "asks for litevae.losses.l3_loss" in caplog.text
    assert "l1_loss" not in caplog.text
