"""Encoders that timm lacks: what the contract gives, and one sentence for each way of breaking it."""

import copy
import os
import re
import sys

import own_networks
import pytest
import torch

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import default_kinds, fair_kinds, pool
from prelude.objectives import OURS, objective_class
from prelude.objectives.options import IJEPAOptions
from prelude.pretrain import named_code
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, check_encoder, forward_tokens, pooled_width, stage_maps
from prelude.pretrain.step_cost import step_cost

SERVES = {
    "small_convnet": {"barlow_twins", "vicreg", "msbreg", "lejepa", "rotation", "spark", "fcmae"},
    "small_transformer": {"barlow_twins", "vicreg", "msbreg", "rotation", "mae", "ijepa"},
    "needs_numbers": {"barlow_twins", "vicreg", "msbreg", "lejepa", "rotation"},
    "resnet_for_small_images": {"barlow_twins", "vicreg", "msbreg", "lejepa", "rotation", "spark", "fcmae"},
}


def config(function, image_size=32, **changes):
    return EncoderConfig(name=f"own_networks:{function}", image_size=image_size, **changes)


def refusal(function, *, tokens=False, **changes) -> str:
    with pytest.raises(UserError) as caught:
        check_encoder(config(function, **changes), tokens=tokens)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


@pytest.mark.parametrize("function", SERVES)
def test_an_objective_takes_the_encoders_that_give_what_it_reads(function):
    served = set()
    for name in OURS:
        cls = objective_class(name)
        try:
            cls.check(cls.Options(), config(function))
        except UserError:
            continue
        served.add(name)
    assert served == SERVES[function]


def test_a_run_of_i_jepa_is_planned_for_an_encoder_that_has_no_blocks_by_name():
    encoder, options = (
        build_encoder(config("small_transformer"), seed=0),
        IJEPAOptions(predictor_dim=24, predictor_depth=1),
    )
    assert not hasattr(encoder, "blocks")
    objective = objective_class("ijepa")(encoder, options, image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    usual, heaviest = objective.telling_steps()
    assert usual != heaviest and step_cost(objective).flops.largest(2) > 0


def test_its_weights_depend_on_the_seed_and_move_no_generator():
    state = torch.get_rng_state()
    one, same, other = (build_encoder(config("small_transformer"), seed=seed).state_dict() for seed in (1, 1, 2))
    check_encoder(config("small_transformer"), tokens=True)
    check_encoder(config("needs_numbers"), tokens=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["patch_embed.weight"], other["patch_embed.weight"])


def test_it_stays_the_users_network():
    encoder = build_encoder(config("small_convnet", kwargs={"width": 4}), seed=0)
    plain = own_networks.small_convnet((32, 32), width=4)
    assert type(encoder) is type(plain) and encoder.training
    plain.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.eval()(images), plain.eval()(images))
    assert pooled_width(encoder) == 16
    assert [tuple(each.shape) for each in stage_maps(copy.deepcopy(encoder), images)] == [
        (2, 4, 16, 16),
        (2, 8, 8, 8),
        (2, 16, 4, 4),
    ]


def test_tokens_are_those_of_the_kept_patches():
    encoder = build_encoder(config("small_transformer"), seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[5, 3, 60], [0, 1, 2]])
    assert forward_tokens(encoder, images, keep).shape == (2, 4, 16)
    every = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(forward_tokens(encoder, images, every), forward_tokens(encoder, images))
    summary = check_encoder(config("small_transformer"), tokens=True)
    assert (summary.grid, summary.patch_size, summary.width) == ((8, 8), (4, 4), 16)


def test_it_is_judged_by_its_own_pooling_and_by_its_stages():
    encoder, images = build_encoder(config("small_convnet"), seed=0).eval(), torch.randn(2, 3, 32, 32)
    assert default_kinds(encoder) == ("pool",) and fair_kinds(encoder) == ("pool", "stages")
    features = pool(encoder, images, ["pool", "stages", "stage0x2"])
    assert torch.equal(features["pool"], encoder(images))
    assert features["stages"].shape == (2, 8 + 16 + 32) and features["stage0x2"].shape == (2, 8 * 4)
    torch.testing.assert_close(features["stages"][:, -32:], features["pool"])
    tokens = build_encoder(config("small_transformer"), seed=0).eval()
    assert fair_kinds(tokens) == ("pool",)
    assert torch.equal(pool(tokens, images, ["pool"])["pool"], tokens(images))


BROKEN = {
    "no_network": "returns a dict and no torch.nn.Module",
    "without_weights": "returns a Identity without a weight",
    "maps_not_pooled": r"forward gives float32 of shape \(2, 4, 30, 30\), where this needs pooled features of shape",
    "raises": r"fails with IndexError in line \d+ of own_networks.py: list index out of range",
    "without_image_size": "no function with a parameter image_size",
    "coarse_to_fine": "where this needs maps from fine to coarse",
    "tokens_missing": r"forward_tokens gives float32 of shape \(2, 62, 16\), where this needs .* 8 x 8 patches",
    "nothing": r"cannot be imported: own_networks .* has no nothing; write module:function",
}


@pytest.mark.parametrize("function", BROKEN)
def test_what_is_no_encoder_is_refused_in_one_sentence(function):
    assert re.search(BROKEN[function], refusal(function))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("leaky", "change when pixels of hidden patches change"),
        ("unordered", "change with the order of `keep`"),
        ("blind", "stay the same when pixels of kept patches change"),
        ("small_convnet", "has no forward_tokens"),
    ],
)
def test_tokens_that_depend_on_what_they_must_not_are_refused(function, why):
    assert why in refusal(function, tokens=True)


def test_settings_go_to_the_function_or_are_refused():
    assert check_encoder(config("any_settings", kwargs={"width": 4}), tokens=False).width == 16
    assert refusal("small_convnet", kwargs={"widht": 4}).endswith("own_networks:small_convnet; did you mean width?")
    for key, value in {"patch_size": 8, "pos_embed": "learned", "norm_eps": 1e-5}.items():
        assert f"encoder.{key} is not handed to" in refusal("small_transformer", **{key: value})
    assert "not a whole number of patches" in refusal("small_transformer", image_size=30)


STRANGERS = [
    ("os:system", {"command": "echo broken into"}),
    ("torch.hub:load", {"repo_or_dir": "stranger/code", "model": "any"}),
    ("builtins:eval", {}),
    ("subprocess:call", {"args": "echo broken into", "shell": True}),
]


@pytest.mark.parametrize(("name", "settings"), STRANGERS)
def test_a_strangers_checkpoint_cannot_call_what_was_not_written_to_build_an_encoder(name, settings, capfd):
    with pytest.raises(UserError, match="no function with a parameter image_size"):
        check_encoder(EncoderConfig(name=name, image_size=32, kwargs=settings), tokens=False)
    assert "broken into" not in capfd.readouterr().out


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, searched after all others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_code_in_the_current_folder_is_found_and_hides_nothing(elsewhere):
    (elsewhere / "mine_of_this_test.py").write_text("def net(image_size): pass")
    (elsewhere / "colorsys.py").write_text("net = None")  # a module of Python's that nothing here has imported yet
    sys.modules.pop("colorsys", None)
    assert callable(named_code.load("encoder.name", "mine_of_this_test:net", "module:function"))
    with pytest.raises(UserError, match=r"colorsys .* has no net"):
        named_code.load("encoder.name", "colorsys:net", "module:function")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError in line 1 of broken_of_this_test.py: No module named"),
        ("x = [", "SyntaxError"),
        ("\n1 / 0", "ZeroDivisionError in line 2 of broken_of_this_test.py"),
        (None, "there is no module broken_of_this_test on the import path"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why_and_where(elsewhere, source, why):
    if source is not None:
        (elsewhere / "broken_of_this_test.py").write_text(source)
    with pytest.raises(UserError) as caught:
        named_code.load("objective.name", "broken_of_this_test:Mine", "module:Class")
    assert why in str(caught.value) and str(caught.value).startswith("objective.name=broken_of_this_test:Mine cannot")


def test_a_change_of_the_source_is_seen(elsewhere):
    path = elsewhere / "changing_of_this_test.py"
    path.write_text("def net(image_size): pass")
    name = "changing_of_this_test:net"
    named_code.load("encoder.name", name, "module:function")
    then = named_code.digests(name, "mae")
    assert set(then) == {name} and named_code.changes(then, named_code.digests(name)) == []
    path.write_text("def net(image_size): return 1")
    os.utime(path)
    assert named_code.changes(then, named_code.digests(name)) == [
        f"the source of {name} has changed since the checkpoint was saved"
    ]


LAYERS = "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, images):\n        return {}\n"


@pytest.mark.parametrize(
    "files",
    [
        {"{}/__init__.py": "from .parts.layers import Net", "{}/parts/__init__.py": "", "{}/parts/layers.py": LAYERS},
        {"{}.py": "from {}_layers import Net", "{}_layers.py": LAYERS},
        {
            "{}.py": "from {}_parts import Net",
            "{}_parts.py": "import {}_layers\nNet = {}_layers.Net",
            "{}_layers.py": LAYERS,
        },
        {"{}.py": "import importlib\nNet = importlib.import_module('{}_' + 'layers').Net", "{}_layers.py": LAYERS},
    ],
    ids=["package", "sibling", "chain", "by its layers"],
)
def test_a_change_in_a_file_that_the_source_imports_is_seen(elsewhere, files, request):
    """By the bank, which is told of the network's layers, and by a resume and the ranks, where an import says so."""
    top = f"split_{abs(hash(request.node.callspec.id))}"
    for name, text in files.items():
        path = elsewhere / name.replace("{}", top)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{}", top) if text != LAYERS else LAYERS.format("images"))
    layers = next(elsewhere.rglob("*layers.py"))
    net = named_code.load("encoder.name", f"{top}:Net", "module:function")
    name, told = f"{top}:build", {"layers": [net]}
    then, alone = named_code.digests(name, **told), named_code.digests(name)
    assert set(then) == {name, f"what {name} imports"}
    layers.write_text(LAYERS.format("2 * images"))
    now = named_code.digests(name, **told)
    assert named_code.changes(then, now) == [
        f"the source of what {name} imports has changed since the checkpoint was saved"
    ]
    assert named_code.changes({name: then[name]}, now) == []  # a checkpoint of before knew of no other file
    assert bool(named_code.changes(alone, named_code.digests(name))) == ("importlib" not in files.get("{}.py", ""))
    layers.write_text("")  # and so no file any more
    assert bool(named_code.changes(alone, named_code.digests(name))) == ("importlib" not in files.get("{}.py", ""))
    assert named_code.changes(then, {f"other_{name}": "1"}) == []


def test_a_source_that_imports_nothing_of_the_users_has_one_digest():
    """So that banks and checkpoints of before stay what they are: torch, timm and Prelude are no code of the user's."""
    layers = [type(layer) for layer in build_encoder(config("small_transformer"), seed=0).modules()]
    assert set(named_code.digests("own_networks:small_transformer", layers=layers)) == {
        "own_networks:small_transformer"
    }
    assert named_code.digests("vit_tiny_patch16_224", "mae", cls=objective_class("mae"), layers=layers) == {}


def test_layers_of_an_installed_package_are_no_code_of_the_users(elsewhere, monkeypatch):
    """Unless the config names the package, so that banks and results outlive its upgrades."""
    installed = elsewhere / "site-packages"
    (installed / "vision_of_this_test").mkdir(parents=True)
    (installed / "vision_of_this_test" / "__init__.py").write_text("from .layers import Net")
    (installed / "vision_of_this_test" / "layers.py").write_text(LAYERS.format("images"))
    monkeypatch.syspath_prepend(installed)
    (elsewhere / "one_file_of_this_test.py").write_text("from vision_of_this_test.layers import Net")
    net = named_code.load("encoder.name", "one_file_of_this_test:Net", "module:function")
    for name, others in (("one_file_of_this_test:build", False), ("vision_of_this_test:build", True)):
        assert set(named_code.digests(name, layers=[net])) == {name, *[f"what {name} imports"] * others}


def test_the_class_of_an_entry_point_has_a_digest():
    cls = own_networks.SmallConvNet  # of any module that is not ours
    assert "offered" in named_code.digests("vit_tiny_patch16_224", "offered", cls=cls)
