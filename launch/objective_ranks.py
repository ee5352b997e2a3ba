"""The part of `prelude check-objective` that needs an engine: a few steps in several ways, at several ranks and at one.

    deepspeed --num_gpus 2 launch/objective_ranks.py FOLDER

FOLDER/config.json is the config of the checks. Each case trains from the same start, through the engine and the store,
into FOLDER/WORLD-CASE; FOLDER/WORLD.json says which of them failed, and why. Where there are several ranks, the first
of them then does the same alone: a process takes longer to start than the cases do. Always on the CPU, so that any
machine has as many ranks as are asked for.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import json
import os
import sys
from pathlib import Path

from prelude.data.errors import in_one_line
from prelude.launch.exit_codes import door, leave

PLAIN, ACCUMULATED, RESUMED = "plain", "accumulated", "resumed"
RESUMED_AT = 2  # steps
GRADIENTS = "gradients.safetensors"


def main(argv: list[str] | None = None) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from prelude.pretrain import distributed
    from prelude.pretrain.config import Config

    folder = Path((sys.argv if argv is None else argv)[-1])
    config = Config.model_validate_json((folder / "config.json").read_text())
    distributed.start(config.train.rank_timeout_seconds)
    run_cases(config, folder)
    goes_on = distributed.is_main() and distributed.world_size() > 1
    distributed.stop()
    if goes_on:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        distributed.start()
        run_cases(config, folder)
        distributed.stop()
    return 0


def run_cases(config, folder: Path) -> None:
    """Collective."""
    from prelude.objectives import objective_class
    from prelude.pretrain import distributed

    world = distributed.world_size()
    failed: dict[str, str] = {}
    for case in cases(objective_class(config.objective["name"])):
        try:
            _run_case(config, case, folder, f"{world}-{case}")
        except Exception as error:  # whatever somebody else's code raises is what is looked for here
            failed[case] = in_one_line(error, 500, typed=True)
    failures = distributed.of_all(failed)
    if distributed.is_main():
        (folder / f"{world}.json").write_text(json.dumps({k: v for one in failures for k, v in one.items()}))


def cases(cls) -> list[str]:
    stages = [f"zero{stage}" for stage in range(1, cls.max_zero_stage + 1)]
    return [PLAIN, RESUMED, *([ACCUMULATED] if cls.accumulates else []), *stages]


def _run_case(config, case: str, folder: Path, name: str) -> None:
    from prelude.checkpoints.store import Store
    from prelude.launch.made_up_data import MemoryLoader, made_up_batch, made_up_volumes
    from prelude.launch.objective_checks import NUM_SAMPLES
    from prelude.objectives.building import build_objective
    from prelude.pretrain import distributed
    from prelude.pretrain.engine import Engine

    config = _config_of(config, case, folder, name)
    objective = build_objective(config)
    if case == ACCUMULATED:
        if not objective.accumulates:
            return
        hold_batch_norms_still(objective)
    micro_batch, _ = config.batching(distributed.world_size())

    def batch_at(positions):
        if objective.takes_volumes and int(positions[0]) // config.train.global_batch % 2:
            return made_up_volumes(positions, objective.views.volumes, NUM_SAMPLES)
        return made_up_batch(positions, objective.views, NUM_SAMPLES)

    loader = MemoryLoader(micro_batch, NUM_SAMPLES, batch_at)
    engine = Engine(config, objective, loader, Store(Path(config.run_dir) / "checkpoints", keep=9), [])
    if config.train.zero_stage == 0:
        _keep_first_gradients(engine, Path(config.run_dir))
    engine.run()


def _config_of(config, case: str, folder: Path, name: str):
    from prelude.pretrain import distributed

    train = {}
    if case == ACCUMULATED:
        train["micro_batch"] = config.train.global_batch // distributed.world_size() // 2
    if case.startswith("zero"):
        train["zero_stage"] = int(case.removeprefix("zero"))
    changes = {"run_dir": str(folder / name), "train": config.train.model_copy(update=train)}
    if case == RESUMED:
        start = folder / name.replace(RESUMED, PLAIN) / "checkpoints" / f"step-{RESUMED_AT:08d}"
        changes["resume"] = config.resume.model_copy(update={"checkpoint": str(start)})
    if case == "zero3":  # small parameters would be kept whole
        changes["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return config.model_copy(update=changes)


def hold_batch_norms_still(module) -> None:
    """Their statistics are those of a micro-batch, which accumulation is known to change."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.train = lambda mode=True, part=part: part


def _keep_first_gradients(engine, run_dir: Path) -> None:
    from prelude.pretrain import distributed
    from prelude.pretrain.files import save_file

    names = {id(parameter): name for name, parameter in engine.objective.named_parameters()}

    def keep(optimizer, *_):
        path = run_dir / GRADIENTS
        if path.exists() or not distributed.is_main():
            return
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        run_dir.mkdir(parents=True, exist_ok=True)
        save_file({names[id(p)]: p.grad.clone().contiguous() for p in held}, path)

    engine.deepspeed.optimizer.register_step_pre_hook(keep)


if __name__ == "__main__":
    leave(door(main))
