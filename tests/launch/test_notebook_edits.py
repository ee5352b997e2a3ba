"""Code of one's own that is edited while a notebook's kernel runs."""

import pytest

from prelude.data.errors import UserError
from prelude.launch.python_settings import overrides_of
from prelude.objectives import options_for
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
    assert load_config("mae_cifar10", told, options_for).objective["noise"] == 0.3
    with pytest.raises(UserError, match="rounds"):
        load_config("mae_cifar10", overrides(own | {"rounds": 2}), options_for)
    settings.write_text(SETTINGS + "    rounds: int = 1\n")
    told = overrides(own | {"rounds": 2})
    assert told[1] == "objective.rounds=2"
    assert load_config("mae_cifar10", told, options_for).objective["rounds"] == 2
