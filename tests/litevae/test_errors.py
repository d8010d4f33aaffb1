import pytest

import litevae.cli
from litevae.errors import NonFiniteError, UserError


@pytest.mark.parametrize(("error", "status"), [(UserError, 2), (NonFiniteError, 1), (OSError, 1)])
def test_command_line_shows_the_error_as_one_line(monkeypatch, capsys, error, status):
    def fail(**_):
        raise error("what is\nwrong")

    monkeypatch.setattr(litevae.cli, "app", fail)
    assert litevae.cli.main([]) == status
    assert capsys.readouterr().err == "litevae: error: what is wrong\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(**_):
        raise ValueError("a bug")

    monkeypatch.setattr(litevae.cli, "app", fail)
    with pytest.raises(ValueError, match="a bug"):
        litevae.cli.main([])
