"""Code of one's own that is edited while a notebook's kernel runs."""

import importlib
import pickle
import sys

import pytest

from prelude.data.errors import UserError
from prelude.launch import notebook
from prelude.launch.python_settings import options_now, overrides_of
from prelude.pretrain.recipes import load_config

OF_ONES_OWN = """
from edited_settings_of_this_test import Settings
from prelude.pretrain.objective import Objective
class Mine(Objective):
    Options = Settings
"""
SETTINGS = "from prelude.pretrain.options import Options\nclass Settings(Options):\n    noise: float = 0.5\n"


def test_an_objective_edited_between_two_cells_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    settings = tmp_path / "edited_settings_of_this_test.py"
    (tmp_path / "edited_of_this_test.py").write_text(OF_ONES_OWN)
    settings.write_text(SETTINGS)
    own = {"objective": {"name": "edited_of_this_test:Mine"}}

    def overrides(settings):
        return overrides_of("mae_cifar10", settings)[0]

    told = overrides(own | {"noise": 0.3})
    assert told[1] == "objective.noise=0.3"
    assert load_config("mae_cifar10", told, options_now).objective["noise"] == 0.3
    with pytest.raises(UserError, match="rounds"):
        load_config("mae_cifar10", overrides(own | {"rounds": 2}), options_now)
    settings.write_text(SETTINGS + "    rounds: int = 1\n")
    told = overrides(own | {"rounds": 2})
    assert told[1] == "objective.rounds=2"
    assert load_config("mae_cifar10", told, options_now).objective["rounds"] == 2


IN_A_PACKAGE = """
from . import settings
from prelude.pretrain.objective import Objective
class Mine(Objective):
    Options = settings.Settings
"""
WITH_A_LATER_CLASS = """from __future__ import annotations
from prelude.pretrain.options import Options
class Settings(Options):
    noise: float = 0.5
    rounds: Rounds | None = None
class Rounds(Options):
    most: int
"""


@pytest.fixture
def asked(monkeypatch):
    """The words of every door that a notebook asks, which does nothing."""
    words = []
    monkeypatch.setattr(notebook, "_ask", lambda door, told, *rest: words.append(told))
    return words


@pytest.mark.parametrize("init", ["", None], ids=["empty", "without"])
@pytest.mark.parametrize("imported", [True, False], ids=["imported", "not imported"])
def test_a_package_is_read_as_it_is_now_beside_what_the_kernel_has_of_it(tmp_path, monkeypatch, asked, init, imported):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"package_of_this_test_{init is None}_{imported}"
    package = tmp_path / name
    package.mkdir()
    if init is not None:
        (package / "__init__.py").write_text(init)
    (package / "objective.py").write_text(IN_A_PACKAGE)
    (package / "settings.py").write_text(SETTINGS)
    ours = importlib.import_module(f"{name}.objective") if imported else None
    before = {key for key in sys.modules if key.startswith(name)}
    own = {"name": f"{name}.objective:Mine"}
    notebook.pretrain("mae_cifar10", objective=own, noise=0.3, run_dir=tmp_path / "run")
    (package / "settings.py").write_text(WITH_A_LATER_CLASS)
    notebook.pretrain("mae_cifar10", objective=own | {"rounds": {"most": 2}}, run_dir=tmp_path / "run")
    assert "objective.noise=0.3" in asked[0] and '"rounds": {"most": 2}' in asked[1][2]
    assert {key for key in sys.modules if key.startswith(name)} == before
    if imported:
        assert pickle.loads(pickle.dumps(ours.Mine)) is ours.Mine
        assert list(ours.settings.Settings.model_fields) == ["noise"]


def test_without_an_edit_nothing_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_settings_of_this_test.py").write_text(SETTINGS)
    (tmp_path / "counted_of_this_test.py").write_text(OF_ONES_OWN + "print('imported')")
    monkeypatch.setattr("builtins.print", lambda *told: printed.append(told))
    printed = []
    assert options_now("counted_of_this_test:Mine") is options_now("counted_of_this_test:Mine")
    assert printed == [("imported",)]
