"""The dictionary that DeepSpeed is initialised with: ours, plus what the user passes through.

A key that both would set to different values is refused, never silently overridden; so is a top-level key
that DeepSpeed does not know, because it would ignore it without a word.
"""

import difflib
import json
from pathlib import Path

from prelude.data.errors import UserError, in_one_line
from prelude.pretrain import precision as precisions
from prelude.pretrain.config import Config

# Where a setting of DeepSpeed's that the run decides is written instead.
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "managed_gradient_accumulation": "train.micro_batch",
    "gradient_clipping": "train.gradient_clipping",
    "torch_autocast": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",  # an older name, which DeepSpeed still honours
    "fp16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_epochs",
    "checkpoint": "checkpoint.every_steps",
}
# Elements of gradients that are sent at once. DeepSpeed allocates larger ones whole, whatever the model's size; smaller
# ones cost more in messages than they save.
_MAX_BUCKET, _MIN_BUCKET = 50_000_000, 2**20
# Of a model: what has been computed can be sent while the rest is computed.
_BUCKETS = 8
# How DeepSpeed sums gradients, which it is not asked to at stage 0: see `gradient_mean`.
_OF_ZERO = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"}
_LONGEST_REASON = 200  # characters


def build(config: Config, *, micro_batch: int, accumulation: int, precision: str, numel: int) -> dict:
    """The full DeepSpeed configuration. Raises UserError for pass-through keys that cannot be honoured."""
    if passed := passed_through(config):
        _refuse_unknown(passed)
    bucket = bucket_size(numel)
    zero = {"stage": config.train.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    passed_zero = passed.pop("zero_optimization", {})
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 clips in the engine, with the norm that it needs anyway to refuse non-finite gradients.
        "gradient_clipping": config.train.gradient_clipping if config.train.zero_stage else 0.0,
        "zero_optimization": zero | passed_zero,
        "zero_allow_untested_optimizer": True,  # which optimizer works at which stage is checked by our config
        "torch_autocast": precisions.autocast_section(precision),
        "wall_clock_breakdown": False,
        **passed,
    }


def notices(config: Config) -> list[str]:
    """What a person should know that a stage leaves out."""
    if config.train.zero_stage < 3 or not config.log.pictures_every_steps:
        return []
    return ["no pictures are drawn at train.zero_stage=3, where no rank has all weights; stages 0 to 2 draw them"]


def bucket_size(numel: int) -> int:
    """Elements in a message of gradients, for a model of that many parameters; DeepSpeed wants an even number."""
    wanted = min(_MAX_BUCKET, max(numel // _BUCKETS, min(_MIN_BUCKET, numel)))
    return -(-wanted // 1024) * 1024


def passed_through(config: Config) -> dict:
    """What the config hands to DeepSpeed. Raises UserError for what the run decides itself."""
    passed = _read(config.deepspeed)
    for key, instead in _OURS.items():
        if key in passed:
            raise UserError(f"deepspeed.{key} is set by the run itself; write {instead}=... and remove it.")
    zero, stage = passed.get("zero_optimization", {}), config.train.zero_stage
    if not isinstance(zero, dict):
        raise UserError(f"deepspeed.zero_optimization={zero!r} is refused: write {{overlap_comm: true}} and its like.")
    if zero.get("stage", stage) != stage:
        raise UserError(
            f"deepspeed.zero_optimization.stage={zero['stage']} contradicts train.zero_stage={stage}; "
            f"write train.zero_stage={zero['stage']} and remove it."
        )
    if stage == 0 and (without_effect := _OF_ZERO & passed.keys()):
        raise UserError(
            f"deepspeed.{min(without_effect)} has no effect at train.zero_stage=0, where the run averages gradients "
            "itself, in float32; remove it, or write train.zero_stage=1."
        )
    if offloading := next((key for key in zero if _offloads(str(key))), None):
        raise UserError(
            f"deepspeed.zero_optimization.{offloading} is refused, since checkpoints do not cover what is offloaded; "
            "remove it."
        )
    return passed


def _offloads(key: str) -> bool:
    """Also under an older name, such as `cpu_offload`, and by ZenFlow, which works on nothing else."""
    return "offload" in key or key == "zenflow"


def check(config: Config) -> None:
    """Refuses, by DeepSpeed's own reading, a value that is passed through. Raises UserError."""
    if not (passed := passed_through(config)):
        return
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    ours = build(config.model_copy(update={"deepspeed": {}}), micro_batch=1, accumulation=1, precision="fp32", numel=1)
    _refuse_unknown(passed)
    for key, value in passed.items():
        try:
            DeepSpeedConfig(ours | {key: {**ours[key], **value} if key == "zero_optimization" else value})
        except (DeepSpeedConfigError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            reason = in_one_line(error, _LONGEST_REASON)
            raise UserError(
                f"deepspeed.{key}={value!r} is refused by DeepSpeed: {reason}; correct it, or remove it."
            ) from error


def _read(passed: dict | str) -> dict:
    if isinstance(passed, dict):
        return dict(passed)
    try:
        found = json.loads(Path(passed).read_text())
        if isinstance(found, dict):
            return found
        raise UserError(f"deepspeed={passed} holds no settings; write the path of a DeepSpeed JSON file.")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"deepspeed={passed} cannot be read; write the path of a DeepSpeed JSON file.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed={passed} is not valid JSON: {error}.") from None


def _refuse_unknown(passed: dict) -> None:
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "flops_profiler", "comms_logger", "activation_checkpointing", "aio", "log_level"}
    known |= {"tensorboard", "csv_monitor", "compile", "timers", "zero_allow_untested_optimizer"}
    for key in passed:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "remove it."
            raise UserError(f"deepspeed.{key} is no key of DeepSpeed's; {hint}")
