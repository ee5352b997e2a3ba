"""An objective in DeepSpeed's engine, as a config says."""

from prelude.pretrain import deepspeed_config, distributed, optimizers
from prelude.pretrain.compiling import compile_objective
from prelude.pretrain.config import Config
from prelude.pretrain.objective import Objective


def initialised(objective: Objective, config: Config, precision: str):
    """The engine of DeepSpeed around `objective`, which is on its device. Collective.

    Raises UserError for settings of DeepSpeed's that cannot be honoured.
    """
    import deepspeed

    train = config.train
    if train.gradient_checkpointing:
        objective.encoder.set_grad_checkpointing(True)
    if train.compile:
        compile_objective(objective)
    micro_batch, accumulation = config.batching(distributed.world_size())
    settings = deepspeed_config.build(
        config, micro_batch=micro_batch, accumulation=accumulation, precision=precision, numel=numel(objective)
    )
    with distributed.nothing_printed():
        optimizer = optimizers.build_optimizer(objective, config, objective.lr_scales())
        engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    return engine


def numel(objective: Objective) -> int:
    return sum(parameter.numel() for parameter in objective.parameters())
