import json

import pytest

from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.deepspeed_config import bucket_size, build, check, notices
from prelude.pretrain.log_config import LogConfig


def config(deepspeed=None, **train) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 1, "global_batch": 8} | train,
            "optimizer": {"lr": 1},
            "deepspeed": deepspeed or {},
        }
    )


def built(settings: Config, numel: int = 10_001) -> dict:
    return build(settings, micro_batch=4, accumulation=2, precision="fp32", numel=numel)


def test_what_deepspeed_would_choose_itself_is_always_written():
    settings = built(config())
    assert settings["gradient_clipping"] == 0.0  # left out, it would clip at 1
    assert settings["train_micro_batch_size_per_gpu"] == 4 and settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"]["reduce_bucket_size"] == 10_240  # left out, 2 GB are allocated
    assert settings["torch_autocast"] == {"enabled": False}
    assert built(config(zero_stage=2, gradient_clipping=0.5))["gradient_clipping"] == 0.5


def test_it_is_told_that_stage_3_draws_no_pictures():
    assert notices(config()) == notices(config(zero_stage=2)) == []
    settings = config(zero_stage=3)
    (note,) = notices(settings)
    assert "no pictures are drawn at train.zero_stage=3" in note
    assert notices(settings.model_copy(update={"log": LogConfig(pictures_every_steps=0)})) == []


def test_pass_through_is_merged_from_a_dictionary_or_a_file(tmp_path):
    passed = {"comms_logger": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(passed))
    for given in (passed, str(file)):
        settings = built(config(given, zero_stage=1))
        assert settings["comms_logger"] == {"enabled": True}
        assert settings["zero_optimization"]["overlap_comm"] is True
        assert settings["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("passed", "sentence"),
    [
        ({"gradient_clipping": 1.0}, "write train.gradient_clipping=... and remove it"),
        ({"fp16": {"enabled": True}}, "write train.precision=... and remove it"),
        ({"optimizer": {"type": "Adam"}}, "write optimizer.name=... and remove it"),
        ({"zero_optimization": {"stage": 3}}, "write train.zero_stage=3 and remove it"),
        ({"bfloat16": {"enabled": True}}, "write train.precision=... and remove it"),
        ({"data_types": {"param_dtype": "bf16"}}, "write train.precision=... and remove it"),
        ({"managed_gradient_accumulation": False}, "write train.micro_batch=... and remove it"),
        ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op has no effect at train.zero_stage=0"),
        ({"comm_logger": {}}, "did you mean comms_logger?"),
        ("/nowhere/ds.json", "deepspeed=/nowhere/ds.json cannot be read"),
        ({"prescale_gradients": True}, "deepspeed.prescale_gradients has no effect at train.zero_stage=0"),
        ({"zero_optimization": [1]}, "deepspeed.zero_optimization=[1] is refused: write {overlap_comm: true}"),
    ],
)
def test_what_cannot_be_honoured_is_refused(passed, sentence):
    with pytest.raises(UserError) as error:
        built(config(passed))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "offloading",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"offload_param": {"device": "cpu"}},
        {"cpu_offload": True},
        {"cpu_offload_param": True},
        {"cpu_offload_use_pin_memory": True},
        {"zenflow": {}},
    ],
)
def test_offloading_is_refused_under_every_name(offloading):
    (key,) = offloading
    with pytest.raises(UserError, match=f"zero_optimization.{key} is refused, since checkpoints do not cover"):
        built(config({"zero_optimization": {"overlap_comm": True} | offloading}, zero_stage=1))


def test_no_older_name_of_deepspeeds_stands_for_offloading():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    older = {
        name: str(field.json_schema_extra["new_param"])
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if field.json_schema_extra and field.json_schema_extra.get("deprecated")
    }
    assert "offload_optimizer" in older.values()
    for name in (name for name, new in older.items() if "offload" in new):
        with pytest.raises(UserError, match="is refused, since checkpoints"):
            built(config({"zero_optimization": {name: True}}, zero_stage=1))


@pytest.mark.parametrize(
    "passed",
    [
        {"zero_optimization": {"mics_shard_size": 2}},
        {"zero_optimization": {"zeropp_loco_param": {}}},
        {"zero_optimization": {"reduce_scatter": "perhaps"}},
        {"zero_optimization": {"no_such_key": 1}},
        {"comms_logger": 5},
        {"flops_profiler": 5},
        {"communication_data_type": 5},
    ],
)
def test_a_value_that_deepspeed_cannot_read_is_refused_by_its_key(passed):
    (key,) = passed
    with pytest.raises(UserError, match=rf"deepspeed.{key}=.* is refused by DeepSpeed: .*; correct it, or remove it"):
        check(config(passed, zero_stage=1))
    check(config({"comms_logger": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}))


@pytest.mark.parametrize(
    ("numel", "size"),
    [(1, 1024), (10_001, 10_240), (2**20, 2**20), (5_000_000, 2**20), (86_000_000, 10_750_976), (10**9, 50_000_896)],
)
def test_gradients_leave_in_pieces_of_an_eighth_of_the_model_within_bounds(numel, size):
    assert bucket_size(numel) == size


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_a_file_that_holds_no_mapping_is_refused(content, tmp_path):
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(UserError, match="ds.json"):
        built(config(str(tmp_path / "ds.json")))
