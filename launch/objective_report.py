"""`prelude check-objective`: runs the checks, compares what runs in several ways have come to, and says it in lines."""

import json
import os
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.saved import open_tensors
from prelude.data.counting import counted
from prelude.data.errors import RunStopped, UserError
from prelude.launch import objective_ranks as ranks
from prelude.launch.children import run_door
from prelude.launch.objective_checks import (
    CHECKS,
    NUM_SAMPLES,
    NUM_STEPS,
    WITHOUT_A_PASS,
    Broken,
    Subject,
    Unusable,
    largest_difference,
)
from prelude.objectives import check_objective, objective_class, options_for
from prelude.pretrain import overrides as setting
from prelude.pretrain.batch_norm import has_batch_norms
from prelude.pretrain.config import Config, EncoderConfig, is_dropout
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.encoders import drops_paths, lay_out_encoder
from prelude.pretrain.recipes import objective_named, read_recipe, refuse_fine_tuning, validate_config

GLOBAL_BATCH = 8
_WORLDS = (1, 2)
_RATE = 0.1  # of SGD with gradients clipped to a norm of 1
_DRIFT = 1e-2  # of how far a tensor moved, between runs that sum in another order


_WORDS = {True: "pass", False: "FAIL", None: "skip"}


@dataclass(frozen=True)
class Verdict:
    name: str
    passed: bool | None  # None: it could not be run
    sentence: str
    usable: bool = True  # whether there is a pass that others could look at

    def __str__(self) -> str:
        head = f"{_WORDS[self.passed]}  {self.name + ': ':<18}"
        return textwrap.fill(self.sentence, 110, initial_indent=head, subsequent_indent=" " * len(head))


def main(name: str, recipe: str, overrides: list[str], *, quick: bool) -> int:
    """Exit code 1 where a check fails. Raises UserError."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on any machine, and the same numbers on all
    subject = Subject(checked_config(name, recipe, overrides))
    check_objective(subject.config)
    found = {True: 0, False: 0, None: 0}
    for verdict in verdicts(subject, quick=quick):
        print(verdict, flush=True)
        found[verdict.passed] += 1
    if not found[False]:
        print(f"{name} keeps the contract")
        return 0
    skipped = f", {found[None]} could not be run" if found[None] else ""
    print(f"{name}: {counted(found[False], 'check')} failed{skipped}")
    return 1


def _drops_paths(encoder: dict) -> bool:
    """Whether an encoder with these settings drops paths. What is wrong with them is told by whoever builds it."""
    try:
        model = lay_out_encoder(EncoderConfig.model_validate(encoder))
    except (UserError, ValidationError):
        return False
    return drops_paths(model)


def checked_config(name: str, recipe: str, overrides: list[str]) -> Config:
    """The recipe's encoder and the objective's options, in a run of a few small steps. Raises UserError."""
    values = read_recipe(recipe, [], options_for)
    refuse_fine_tuning(values, recipe)
    if objective_named(values) != name:
        values["objective"] = {}
    values["objective"]["name"] = name
    for override in overrides:
        setting.apply(values, override, Keys(options_for(name)))
    encoder = dict(values.get("encoder") or {})
    kwargs = encoder.get("kwargs") or {}
    # What draws from torch's generator by design (drop path) would hide what must not.
    encoder["kwargs"] = {key: value for key, value in kwargs.items() if not is_dropout(key)}
    if _drops_paths(encoder):  # by timm's own default, as Swin does
        encoder["kwargs"]["drop_path_rate"] = 0.0
    for key in ("weights", "weights_fingerprint", "own_parts"):
        encoder.pop(key, None)
    data = {key: value for key, value in (values.get("data") or {}).items() if key in ("channels", "mean", "std")}
    if objective_class(name).takes_volumes:
        data["volumes"] = {"shards": "none"}
    checked = {
        "run_dir": "none",
        "seed": values.get("seed", 0),
        "data": {"shards": "none", **data},
        "encoder": encoder,
        "objective": values["objective"],
        "train": {
            "epochs": NUM_STEPS * GLOBAL_BATCH / NUM_SAMPLES,
            "global_batch": GLOBAL_BATCH,
            "precision": "fp32",
            "gradient_clipping": 1.0,
            "rank_timeout_seconds": 120,
        },
        "optimizer": {
            "name": "sgd",
            "lr": _RATE,
            "lr_rule": "absolute",
            "weight_decay": 0.0,
            "first_step": 1,
        },
        "checkpoint": {"every_steps": ranks.RESUMED_AT, "keep": 9},
        "log": {"every_steps": 1, "pictures_every_steps": 0},
    }
    return validate_config(checked, str(recipe), options_for)


def verdicts(subject: Subject, *, quick: bool = False) -> Iterator[Verdict]:
    """One for each check, as it is done. Where the first one finds no pass to look at, the others say that they were
    not run, but for those that need none."""
    usable = yield from _of_one_process(subject)
    if objective_class(subject.config.objective["name"]).takes_volumes:
        of_volumes = yield from _of_one_process(replace(subject, of_volumes=True), " (volumes)")
        usable = usable and of_volumes
    if quick:
        return
    first = next(iter(CHECKS))
    if not usable:
        yield from (_not_run(name, first) for name in RUN_CHECKS)
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(subject, Path(folder))
        for name, check in RUN_CHECKS.items():
            if name != "accumulation" or subject.fresh().accumulates:
                yield _verdict(name, lambda check=check: check(runs))


def _of_one_process(subject: Subject, suffix: str = "") -> Generator[Verdict, None, bool]:
    """Returns whether there is a pass that others could look at. suffix: of the checks' names."""
    first, *others = CHECKS
    verdict = _verdict(first + suffix, lambda: CHECKS[first](subject))
    yield verdict
    for name in others:
        found = None
        if verdict.usable or name in WITHOUT_A_PASS:
            found = _verdict(name + suffix, lambda name=name: CHECKS[name](subject))
        same = found and not verdict.passed and found.sentence == verdict.sentence
        yield _not_run(name + suffix, first) if found is None or same else found
    return verdict.usable


def _not_run(name: str, first: str) -> Verdict:
    return Verdict(name, None, f"not run, as there is nothing to look at before {first} passes")


def _verdict(name: str, check: Callable[[], str]) -> Verdict:
    try:
        return Verdict(name, True, check())
    except Broken as broken:
        return Verdict(name, False, str(broken), not isinstance(broken, Unusable))
    except Exception as error:  # whatever somebody else's code raises is what is looked for here
        what = f"It raises {type(error).__name__}{_place(error)}: {' '.join(str(error).split())}"
        return Verdict(name, False, what, False)


def _place(error: Exception) -> str:
    """The innermost line outside of our packages and torch's."""
    root = Path(__file__).resolve().parents[1]
    ours = tuple(str(root / folder) + os.sep for folder in ("launch", "objectives", "pretrain", "data"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "site-packages" not in frame.filename and not frame.filename.startswith(ours):
            return f" in line {frame.lineno} of {Path(frame.filename).name}"
    return ""


# ---- runs in several ways


class Runs:
    """Started when the first of them is asked for, all at once."""

    def __init__(self, subject: Subject, folder: Path):
        self.subject, self.folder = subject, folder
        self.failures: dict[int, dict[str, str]] = {}  # by number of ranks, and there by case; "" for all
        start = subject.fresh()
        self.start = {name: value.clone() for name, value in start.state_dict().items()}
        self.has_batch_norm = has_batch_norms(start)
        (folder / "config.json").write_text(subject.config.model_dump_json())

    def gradients(self, world: int, case: str = ranks.PLAIN) -> dict[str, Tensor]:
        """Of the first step."""
        return load_file(self.folder_of(world, case) / ranks.GRADIENTS)

    def moved(self, world: int, case: str) -> dict[str, Tensor]:
        """By how much all steps together have moved each weight and buffer."""
        return {name: value.double() - self.start[name].double() for name, value in self.weights(world, case).items()}

    def weights(self, world: int, case: str) -> dict[str, Tensor]:
        return dict(open_tensors(self.folder_of(world, case) / "checkpoints" / f"step-{NUM_STEPS:08d}"))

    def folder_of(self, world: int, case: str) -> Path:
        if not self.failures:
            self._launch()
        failures = self.failures[world]
        if why := failures.get("", failures.get(case)):
            raise Broken(f"At {counted(world, 'rank')}, {case}, it raises {why}")
        return self.folder / f"{world}-{case}"

    def _launch(self) -> None:
        """The most ranks are launched, and leave what one of them finds alone; unless they failed, so that it is asked
        for by itself."""
        for world in sorted(_WORLDS, reverse=True):
            found, why = self.folder / f"{world}.json", ""
            if not found.exists():
                why = run_door("objective_ranks", [str(self.folder)], num_ranks=world, name="ranks", quiet=True)
            self.failures[world] = json.loads(found.read_text()) if found.exists() else {"": why}


def same_at_ranks(runs: Runs) -> str:
    one, two = _WORLDS
    if where := largest_difference(runs.gradients(one), runs.gradients(two)):
        raise Broken(
            f"The first step's gradient at 2 ranks is another in {where}; draw by batch.seeds, take the mean over the "
            "batch, and give batch norms all ranks (prelude.pretrain.batch_norm.synchronise)."
        )
    if where := largest_difference(runs.moved(one, ranks.PLAIN), runs.moved(two, ranks.PLAIN), _DRIFT):
        raise Broken(f"After {NUM_STEPS} steps at 2 ranks {where} is another; look at buffers, and at after_step.")
    return f"1 and 2 ranks have the same gradients, and the same weights after {NUM_STEPS} steps"


def same_when_accumulated(runs: Runs) -> str:
    one, two = _WORLDS
    pairs = [(runs.gradients(one, ranks.ACCUMULATED), runs.gradients(two, ranks.ACCUMULATED))]
    if not runs.has_batch_norm:
        pairs.append((runs.gradients(one), runs.gradients(one, ranks.ACCUMULATED)))
    for whole, parts in pairs:
        if where := largest_difference(whole, parts):
            raise Broken(f"With two micro-batches a step the gradient is another in {where}; look what mixes samples.")
    return "two micro-batches a step have the gradients of one" + (
        ", batch norms held still" if runs.has_batch_norm else ""
    )


def same_after_resume(runs: Runs) -> str:
    for world in _WORLDS:
        whole, resumed = runs.weights(world, ranks.PLAIN), runs.weights(world, ranks.RESUMED)
        odd = next((name for name, value in whole.items() if not torch.equal(value, resumed[name])), "")
        if odd:
            raise Broken(
                f"A run that goes on from step {ranks.RESUMED_AT} at {world} ranks ends with another {odd}; keep what "
                "decides a step in parameters or buffers."
            )
    return f"a run that goes on from step {ranks.RESUMED_AT} ends at the same weights, bit for bit"


def same_under_zero(runs: Runs) -> str:
    highest = objective_class(runs.subject.config.objective["name"]).max_zero_stage
    for stage in range(1, highest + 1):
        for world in _WORLDS:
            if where := largest_difference(runs.moved(world, ranks.PLAIN), runs.moved(world, f"zero{stage}"), _DRIFT):
                raise Broken(
                    f"ZeRO stage {stage} at {world} ranks ends with another {where}; where weights are read outside of "
                    "forward, write max_zero_stage = 2."
                )
    return f"ZeRO stages 0 to {highest} end at the same weights"


def exported_from_a_run(runs: Runs) -> str:
    try:
        report = export_encoder(str(runs.folder_of(1, ranks.PLAIN)), runs.folder / "export")
    except (UserError, RunStopped) as error:
        raise Broken(str(error)) from None
    return f"a checkpoint's encoder is exported, and loads with features that differ by {report.max_difference:.0e}"


RUN_CHECKS: dict[str, Callable[[Runs], str]] = {
    "ranks": same_at_ranks,
    "accumulation": same_when_accumulated,
    "resume": same_after_resume,
    "ZeRO": same_under_zero,
    "export": exported_from_a_run,
}
