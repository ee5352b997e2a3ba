"""The dictionary that DeepSpeed is initialised with: ours, plus what the user passes through.

A key that both would set to different values is refused, never silently overridden; so is a top-level key
that DeepSpeed does not know, because it would ignore it without a word.
"""

import difflib
import json
from pathlib import Path

from prelude.data.errors import UserError
from prelude.pretrain import precision as precisions
from prelude.pretrain.config import Config

# Where a setting of DeepSpeed's that the run decides is written instead.
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "train.gradient_clipping",
    "torch_autocast": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_epochs",
    "checkpoint": "checkpoint.every_steps",
}
# Larger buckets are allocated whole, whatever the model's size.
_MAX_BUCKET = 50_000_000


def build(config: Config, *, micro_batch: int, accumulation: int, precision: str, numel: int) -> dict:
    """The full DeepSpeed configuration. Raises UserError for pass-through keys that cannot be honoured."""
    passed = _read(config.deepspeed)
    for key, instead in _OURS.items():
        if key in passed:
            raise UserError(f"deepspeed.{key} is set by the run itself; write {instead}=... and remove it.")
    _refuse_unknown(passed)
    bucket = min(_MAX_BUCKET, -(-numel // 1024) * 1024)  # DeepSpeed wants an even number
    zero = {"stage": config.train.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    passed_zero = passed.pop("zero_optimization", {})
    if passed_zero.get("stage", zero["stage"]) != zero["stage"]:
        raise UserError(
            f"deepspeed.zero_optimization.stage={passed_zero['stage']} contradicts train.zero_stage={zero['stage']}; "
            f"write train.zero_stage={passed_zero['stage']} and remove it."
        )
    if any(key.startswith("offload") for key in passed_zero):
        raise UserError("deepspeed.zero_optimization cannot offload: checkpoints do not cover it; remove offload_*.")
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


def _read(passed: dict | str) -> dict:
    if isinstance(passed, dict):
        return dict(passed)
    try:
        return json.loads(Path(passed).read_text())
    except OSError:
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
