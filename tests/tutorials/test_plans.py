"""The recipes of one GPU by the planner: what their headers say they take, and no larger micro-batch would fit.

In the second stage, as a step of each is watched.
"""

import re

import pytest

from prelude.launch.recipe_index import shipped
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain import devices
from prelude.pretrain.preview import Preview
from prelude.pretrain.recipes import load_config
from prelude.pretrain.step_cost import step_cost

RECIPES = [recipe for recipe in shipped() if "on one GPU of 24 GiB" in recipe.trains]
pytestmark = pytest.mark.tutorial


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_fits_24_gib_as_its_header_says(recipe):
    config = load_config(recipe.name, [], options_for)
    objective = build_objective(config)
    precision = devices.precision_of("rtx4090") if config.train.precision == "auto" else config.train.precision
    checkpointing = config.train.gradient_checkpointing
    cost = step_cost(objective, precision, checkpointing)
    found = Preview(config, objective, 100_000, 1, precision, {checkpointing: cost})
    memory = devices.named("rtx4090", precision).memory
    micro_batch, accumulation = config.batching(1)
    largest = found.held.largest_micro_batch(cost, memory, 0, 1)
    assert micro_batch <= largest
    for said in re.findall(r"planned, not measured: ([\d.]+) of 24 GiB", recipe.takes):
        assert found.rank_memory().peak / 2**30 == pytest.approx(float(said), abs=0.1)
        assert ("with checkpointing" in recipe.takes) == checkpointing
        assert accumulation == 1 or largest < 2 * micro_batch
