"""`perceptiondlm serve` turns its arguments into a recipe; a missing extra is named."""

import sys

import pytest

from perceptiondlm.scripts.cli import main


def test_arguments_become_a_recipe(monkeypatch):
    pytest.importorskip("uvicorn", reason='the server is an extra: pip install "perceptiondlm[serve]"')
    from perceptiondlm.serving.server import run

    served = []
    monkeypatch.setattr(run, "serve", lambda *arguments: served.append(arguments))
    arguments = "--port 0 --max-regions 9 --max-body-mb 3 --max-new-tokens-accepted 64 --image-cache-mb 5 --preset fast"
    assert main(["serve", *arguments.split(), "--steps", "4", "--allow-urls", "--answer-seconds", "7"]) == 0
    ((recipe, host, port),) = served
    assert (host, port) == ("127.0.0.1", 0)
    assert recipe.engine["settings"] == {"preset": "fast", "steps": 4}
    assert recipe.engine["cache_bytes"] == 5 * 2**20
    limits = recipe.limits
    assert (limits.max_regions, limits.max_body_bytes, limits.max_new_tokens) == (9, 3 * 2**20, 64)
    assert (limits.allow_urls, limits.answer_seconds) == (True, 7.0)


def test_wrong_arguments_are_named(capsys):
    pytest.importorskip("uvicorn", reason='the server is an extra: pip install "perceptiondlm[serve]"')
    assert main(["serve", "--max-regions", "0"]) == 2
    assert "max_regions must be above 0, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "extra", "more"), [("uvicorn", "serve", []), ("ray", "ray", ["--ray"])])
def test_a_missing_extra_is_named_with_its_install_line(monkeypatch, capsys, missing, extra, more):
    if missing == "ray":
        pytest.importorskip("uvicorn", reason='the server is an extra: pip install "perceptiondlm[serve]"')
    for name in [
        name for name in sys.modules if name.startswith(("perceptiondlm.serving.server", "perceptiondlm.serving.ray"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", *more]) == 2
    assert f'pip install "perceptiondlm[{extra}]"' in capsys.readouterr().err
