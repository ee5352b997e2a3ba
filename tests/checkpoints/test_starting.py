"""A run that starts from weights: what the encoder and the objective around it hold, and what is refused."""

import pytest
import torch
from published import METHODS, WIDTH, decoder_shapes, drawn, fixed_table, jepa, mae, spark
from torch import nn

from prelude.checkpoints.starting import start_of
from prelude.checkpoints.store import Store
from prelude.data.errors import UserError
from prelude.objectives import check_objective
from prelude.objectives.building import build_objective
from prelude.objectives.mae import MAE
from prelude.pretrain.config import Config
from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress

SMALL = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2}
VIT = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "kwargs": SMALL}
NO_CLASS = VIT | {"kwargs": SMALL | {"class_token": False, "global_pool": "avg", "fc_norm": False}}
NO_ROW = VIT | {"kwargs": SMALL | {"no_embed_class": True, "global_pool": "avg", "fc_norm": False}}
RESNET = {"name": "resnet18", "image_size": 32, "kwargs": {"layers": [1, 1, 1, 1]}}
BOTTLENECKS = {"name": "resnet50", "image_size": 32, "kwargs": {"layers": [1, 1, 1, 1]}}
CONVNEXT = {"name": "convnext_tiny", "image_size": 64, "kwargs": {"depths": [1] * 4, "dims": [8, 12, 16, 20]}}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
PREDICTOR = {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2, "target_scale": [0.2, 0.3]}
OBJECTIVES = {
    "mae": ({"name": "mae", **DECODER}, VIT, "MAE"),
    "ijepa": ({"name": "ijepa", **PREDICTOR}, NO_CLASS, "I-JEPA"),
    "dseqjepa": ({"name": "dseqjepa", **PREDICTOR}, NO_ROW, "DSeq-JEPA"),
    "rotation": ({"name": "rotation"}, RESNET, "torchvision ResNet"),
    "barlow_twins": ({"name": "barlow_twins", "projector": [6, 6, 6]}, BOTTLENECKS, "Barlow Twins"),
    "spark": ({"name": "spark", "decoder_dim": 64}, CONVNEXT, "SparK"),
}


def config_of(objective: dict, encoder: dict, **changes) -> Config:
    values = {"run_dir": "run", "data": {"shards": "-"}, "encoder": encoder, "objective": objective}
    values |= {"train": {"epochs": 1, "global_batch": 4}, "optimizer": {"lr": 0.1, "lr_rule": "absolute"}}
    return Config.model_validate(values | changes)


def started(published, path, objective: dict, encoder: dict, **changes):
    torch.save(published.tree, path)
    words = ",".join(word for word in published.words[1:].split(",") if not word.startswith("num_heads"))
    encoder = {"weights": f"{path}{'#' if words else ''}{words}"} | encoder
    start = start_of(config_of(objective, encoder, **changes))
    return start, build_objective(start.config, start.warm)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_encoder_and_teacher_start_at_the_weights_and_own_parts_as_ever(name, tmp_path):
    options, encoder, method = OBJECTIVES[name]
    published = METHODS[method]()
    start, objective = started(published, tmp_path / "weights.pth", options, encoder)
    total = len(objective.encoder.state_dict())
    assert f"{published.format}, {published.loaded} of {total} tensors loaded" in start.sentence
    weights = start.weights.tensors
    for part in (objective.encoder, objective.exported_encoder()):
        state = part.state_dict()
        assert all(torch.equal(state[key], weights[key]) for key in weights)
        assert set(state) - set(weights) <= {"head.norm.weight", "head.norm.bias"}  # which SparK does not have
    fresh = build_objective(config_of(options, encoder))
    own = [key for key in objective.state_dict() if not key.startswith(("encoder.", "teacher."))]
    assert own and all(objective.state_dict()[key].shape == fresh.state_dict()[key].shape for key in own)
    again = build_objective(start.config, start.warm).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in objective.state_dict().items())


@pytest.mark.parametrize("name", ["ijepa", "dseqjepa"])
def test_what_a_step_draws_does_not_depend_on_where_the_encoder_starts(name, tmp_path):
    options, encoder, method = OBJECTIVES[name]
    _, objective = started(METHODS[method](), tmp_path / "weights.pth", options, encoder)
    assert objective.salt == build_objective(config_of(options, encoder)).salt


def test_the_record_says_what_a_run_started_from_and_checks_it(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    start, _ = started(mae(), tmp_path / "weights.pth", options, encoder)
    recorded = start.config.encoder
    assert recorded.weights == str(tmp_path / "weights.pth")
    assert recorded.weights_fingerprint == start.weights.fingerprint
    assert start_of(start.config).config == start.config
    network = mae().tree | {"model": mae().network | {"norm.bias": torch.ones(WIDTH)}}
    torch.save(network, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="has the fingerprint .* and not encoder.weights_fingerprint="):
        start_of(start.config)


@pytest.mark.parametrize("own_parts", [False, True])
@pytest.mark.parametrize("network", ["teacher", "student"])
def test_an_earlier_run_is_gone_on_from_at_another_size(network, own_parts, tmp_path, save):
    options, encoder, _ = OBJECTIVES["ijepa"]
    earlier = config_of(options, encoder, seed=5)
    state = build_objective(earlier).state_dict()
    meta = {"encoder": earlier.encoder.model_dump(mode="json"), "exported": "teacher.", "config": earlier.model_dump()}
    meta |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    moved = [name for name in state if name.startswith("encoder.") and name != "encoder.pos_embed"]
    state |= {name: state[name] + 1 for name in moved}
    save(Store(tmp_path / "run" / "checkpoints"), 7, meta=meta, encoder=state)
    place, other = ("teacher", "student") if network == "teacher" else ("encoder", "teacher")
    weights = f"{tmp_path / 'run'}#student" if network == "student" else str(tmp_path / "run")
    larger = encoder | {"image_size": 24, "weights": weights, "own_parts": own_parts}
    start = start_of(config_of(options, larger))
    objective = build_objective(start.config, start.warm)
    for name, tensor in objective.encoder.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, state[f"{place}.{name}"])
    assert "29 of 29 tensors loaded, position table resampled from 4 x 4 to 6 x 6 (by its formula)" in start.sentence
    assert f"{other} (29)" in start.sentence
    predictor = {f"predictor.{name}": tensor for name, tensor in objective.predictor.state_dict().items()}
    same = [torch.equal(tensor, state[name]) for name, tensor in predictor.items()]
    assert all(same) if own_parts else not all(same)


def test_pixels_that_are_normalised_otherwise_are_said(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    data = {"shards": "-", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    start, _ = started(mae(), tmp_path / "weights.pth", options, encoder, data=data)
    assert "; its pixels were normalised by data.mean=[0.485, 0.456, 0.406] and data.std=[0.229" in start.sentence
    start, _ = started(mae(), tmp_path / "weights.pth", options, encoder)
    assert "normalised" not in start.sentence.replace(str(tmp_path), "")


def test_weights_of_three_channels_start_a_run_of_another_number(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    ways = {1: "1 channel (summed)", 4: "4 channels (repeated in turn or cut off, times 3 / 4)"}
    for channels, how in ways.items():
        data = {"shards": "-", "channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
        start, _ = started(mae(), tmp_path / "weights.pth", options, encoder, data=data)
        assert f"first layer brought from 3 to {how}" in start.sentence
        assert "; its pixels were normalised by data.mean=[0.485, 0.456, 0.406]" in start.sentence


def test_a_run_that_goes_on_does_not_read_the_weights(tmp_path, save):
    options, encoder, _ = OBJECTIVES["mae"]
    start, _ = started(mae(), tmp_path / "weights.pth", options, encoder)
    store = Store(tmp_path / "checkpoints")
    save(store, 3, meta={"encoder": start.config.encoder.model_dump(mode="json")})
    (tmp_path / "weights.pth").unlink()
    asked = config_of(options, encoder | {"weights": str(tmp_path / "weights.pth")})
    going_on = start_of(asked, store)
    assert going_on.config == start.config and going_on.warm is None and going_on.sentence == ""
    with pytest.raises(UserError, match="There is no folder .*weights.pth"):
        start_of(asked, Store(tmp_path / "elsewhere"))


CHANGES = {
    "another number of heads": ({}, {"num_heads": 4}, "#num_heads=2", "trained with 2 attention heads.*num_heads=2"),
    "another norm": ({"norm_eps": 1e-5}, {}, "", "LayerNorms of eps 1e-06, and .* has 1e-05; write encoder.norm_eps"),
    "another prefix": ({}, {"global_pool": "avg", "fc_norm": False, "class_token": False}, "", "1 row of prefix"),
    "another depth": ({}, {"depth": 3}, "", ": 12 tensors of blocks.2 are missing; write"),
    "another width": ({}, {"embed_dim": 32}, "", r"cls_token is \(1, 1, 24\) instead of \(1, 1, 32\)"),
    "random": ({"weights": "random:timm:resnet18"}, {}, "", "holds no weights; leave it out"),
    "nothing there": ({"weights": "nowhere.pth"}, {}, "", "There is no folder nowhere.pth; write a run folder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_another_encoder_are_refused_with_what_to_write(change, tmp_path):
    encoder, kwargs, words, why = CHANGES[change]
    torch.save(mae().tree, tmp_path / "weights.pth")
    given = {"weights": f"{tmp_path}/weights.pth{words}", **VIT, **encoder, "kwargs": SMALL | kwargs}
    with pytest.raises(UserError, match=why):
        start = start_of(config_of({"name": "rotation"}, given))
        build_objective(start.config, start.warm)


def test_a_learned_table_is_not_held_fixed(tmp_path):
    with pytest.raises(UserError, match="has a learned table of positions.*write encoder.pos_embed=learned"):
        started(METHODS["DINO"](), tmp_path / "weights.pth", {"name": "mae", **DECODER}, VIT)
    _, objective = started(
        METHODS["DINO"](), tmp_path / "weights.pth", {"name": "mae", **DECODER}, VIT | {"pos_embed": "learned"}
    )
    assert isinstance(objective.encoder.pos_embed, nn.Parameter)


def test_weights_do_not_come_in_through_timms_back_door(tmp_path):
    for key in ("checkpoint_path", "pretrained_cfg"):
        encoder = VIT | {"kwargs": SMALL | {key: str(tmp_path / "weights.pth")}}
        with pytest.raises(UserError, match=f"kwargs.{key} loads weights without a word; write encoder.weights"):
            check_objective(config_of({"name": "mae", **DECODER}, encoder))


class Careless(MAE):
    """An objective from outside that draws the encoder's weights whatever they were."""

    def _initialise(self):
        super()._initialise()
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)


def test_an_objective_that_draws_the_encoder_anew_is_found_out(tmp_path):
    with pytest.raises(UserError, match="gives new values to patch_embed.proj.bias .1 of 30 tensors.*is_warm first"):
        started(mae(), tmp_path / "weights.pth", {"name": f"{__name__}:Careless", **DECODER}, VIT)


def test_keys_without_effect_are_refused():
    for encoder in ({"own_parts": True}, {"weights_fingerprint": "abc"}):
        with pytest.raises(ValueError, match="has no effect without weights"):
            config_of({"name": "mae", **DECODER}, VIT | encoder)
    frozen = config_of(
        {"name": "mae", **DECODER}, VIT, train={"epochs": 1, "global_batch": 4, "freeze_encoder_steps": 5}
    )
    with pytest.raises(UserError, match="freeze_encoder_steps=5 would hold an encoder that is still random"):
        check_objective(frozen)


# ---- going on from there


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_frozen_encoder_does_not_move_and_its_teacher_neither_until_its_time(name, tmp_path):
    options, encoder, method = OBJECTIVES[name]
    train = {"epochs": 1, "global_batch": 4, "freeze_encoder_steps": 2}
    decay = {"lr": 0.1, "lr_rule": "absolute", "weight_decay": 0.3}
    start, objective = started(
        METHODS[method](), tmp_path / "weights.pth", options, encoder, train=train, optimizer=decay
    )
    optimizer = build_optimizer(objective, start.config)
    for step in range(3):
        before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
        apply_schedule(optimizer.param_groups, start.config, Progress(step, 10, 10.0))
        for parameter in objective.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        objective.after_step(Progress(step + 1, 10, 10.0), torch.ones(()))
        after = objective.state_dict()
        moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        taught = {key.split(".")[0] for key in before} & {"encoder", "teacher"}
        assert moved - taught and moved & taught == (set() if step < 2 else taught)


def test_layer_decay_slows_the_encoders_first_layers(tmp_path):
    options, encoder, method = OBJECTIVES["mae"]
    optimizer = {"lr": 0.1, "lr_rule": "absolute", "layer_decay": 0.5}
    start, objective = started(METHODS[method](), tmp_path / "weights.pth", options, encoder, optimizer=optimizer)
    built = build_optimizer(objective, start.config)
    apply_schedule(built.param_groups, start.config, Progress(0, 10, 10.0))
    names = {parameter: name for name, parameter in objective.named_parameters()}
    rates = {names[parameter]: group["lr"] for group in built.param_groups for parameter in group["params"]}
    assert rates["encoder.cls_token"] == pytest.approx(0.1 * 0.5**3)
    assert rates["encoder.blocks.0.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5**2)
    assert rates["encoder.blocks.1.norm1.weight"] == pytest.approx(0.1 * 0.5)
    assert rates["encoder.norm.weight"] == rates["decoder_pred.weight"] == pytest.approx(0.1)


# ---- an objective's own parts


def test_a_decoder_is_taken_along(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    start, objective = started(mae(), tmp_path / "weights.pth", options, encoder | {"own_parts": True})
    decoder = {name: t for name, t in drawn(decoder_shapes(), 1).items() if name != "decoder_pos_embed"}
    state = objective.state_dict()
    assert all(torch.equal(state[name], decoder[name]) for name in decoder)
    assert start.sentence.endswith("30 of 30 tensors loaded, and 19 tensors of the objective's own parts")


@pytest.mark.parametrize("name", ["ijepa", "dseqjepa"])
def test_a_predictor_is_taken_along(name, tmp_path):
    options, encoder, method = OBJECTIVES[name]
    published = METHODS[method]()
    _, objective = started(published, tmp_path / "weights.pth", options, encoder | {"own_parts": True})
    found = {
        key.removeprefix("module.").removeprefix("predictor_"): t for key, t in published.tree["predictor"].items()
    }
    assert len(objective.predictor.state_dict()) == len(found) - 1  # the table of positions is a formula's
    assert all(torch.equal(t, found[key]) for key, t in objective.predictor.state_dict().items())


def test_a_projector_is_taken_along(tmp_path):
    options, encoder, method = OBJECTIVES["barlow_twins"]
    published = METHODS[method]()
    _, objective = started(published, tmp_path / "weights.pth", options, encoder | {"own_parts": True})
    for key, tensor in objective.projector.state_dict().items():
        assert torch.equal(tensor, published.network[f"module.projector.{key}"])


def test_a_sparse_decoder_is_taken_along(tmp_path):
    options, encoder, _ = OBJECTIVES["spark"]
    fresh = build_objective(config_of(options, encoder))
    published, wanted = spark(), {}
    conv = {"0": "up_sample", "1": "conv.0", "2": "conv.1", "4": "conv.3", "5": "conv.4"}
    module = {name: value for name, value in published.network.items() if name.startswith("sparse_encoder.")}
    for name, tensor in fresh.state_dict().items():
        if name.startswith("encoder."):
            continue
        part, value = name.split("."), torch.full_like(tensor, float(len(wanted) + 1))
        if name.startswith("decoder.blocks."):
            official = f"dense_decoder.dec.{part[2]}.{conv[part[3]]}.{part[4]}"
        elif name.startswith("decoder."):
            official = f"dense_decoder.proj.{part[2]}"
        elif part[2] == "mask_token":
            official = f"mask_tokens.{part[1]}"
        else:
            official = f"densify_{'norms' if part[2] == 'norm' else 'projs'}.{part[1]}.{part[3]}"
        module[official] = wanted[name] = value
    published.tree["module"] = module
    _, objective = started(published, tmp_path / "weights.pth", options, encoder | {"own_parts": True})
    state = objective.state_dict()
    assert len(wanted) > 20 and all(torch.equal(state[name], value) for name, value in wanted.items())


def test_own_parts_that_are_not_there_or_do_not_fit_are_refused(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    warm = encoder | {"own_parts": True}
    with pytest.raises(UserError, match="has no own parts of objective.name=mae: it has none; write encoder.own_parts"):
        started(mae(full=False), tmp_path / "weights.pth", options, warm)
    with pytest.raises(UserError, match="it has those of ijepa"):
        started(jepa(), tmp_path / "weights.pth", options, NO_CLASS | {"own_parts": True})
    with pytest.raises(UserError, match=r"mask_token is \(1, 1, 16\) instead of \(1, 1, 32\), .* and \d+ more; write"):
        started(mae(), tmp_path / "weights.pth", options | {"decoder_dim": 32}, warm)
    published = mae()
    del published.network["decoder_pred.bias"]
    with pytest.raises(UserError, match="own parts of objective.name=mae: decoder_pred.bias is missing"):
        started(published, tmp_path / "weights.pth", options, warm)


def test_a_fixed_table_is_recomputed_for_another_grid(tmp_path):
    options, encoder, _ = OBJECTIVES["mae"]
    start, objective = started(mae(), tmp_path / "weights.pth", options, encoder | {"image_size": [16, 32]})
    assert "position table resampled from 4 x 4 to 4 x 8 (by its formula)" in start.sentence
    fresh = build_objective(config_of(options, encoder | {"image_size": [16, 32]}))
    assert torch.equal(objective.encoder.pos_embed, fresh.encoder.pos_embed)
    assert objective.encoder.pos_embed[0, 1:].shape[0] != fixed_table(False).shape[1]
