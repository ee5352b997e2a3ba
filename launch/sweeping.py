"""A sweep from its combinations to its table: each is trained through the door of pretraining, unless it is finished.

- A run that fails keeps no other from being trained, and is told in the table with its reason.
- The table is written after every run, so that it can be looked at meanwhile.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.text import Text

from prelude.data.errors import UserError
from prelude.data.whole_files import write_whole
from prelude.evaluators.comparing.run_record import curves_of, is_finished_as
from prelude.evaluators.comparing.table import NOTHING, plain
from prelude.evaluators.table_text import PlainTable, print_plain
from prelude.launch import training
from prelude.launch.children import DOORS, IN_OUT, Preempted, run_door
from prelude.launch.combinations import Combination
from prelude.launch.exit_codes import INCOMPLETE, PREEMPTED
from prelude.objectives import options_for
from prelude.pretrain import distributed
from prelude.pretrain.files import reason, refuse_unwritable, remedy

PROBES = ("linear", "knn")  # the first decides the order
TITLES = {"linear": "online linear, top-1 %", "knn": "online k-NN, top-1 %"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?( |$)")  # what no escape has to keep from being a list in Markdown
SMOOTHED = 0.05  # share of the run over whose end the loss is averaged


@dataclass(frozen=True)
class Row:
    """What has come of a combination so far."""

    combination: Combination
    steps: int  # done
    loss: float | None
    probes: dict[str, tuple[float, float]]  # percent and its standard error, of the newest online evaluation
    finished: bool
    problem: str | None = None


def sweep(args: argparse.Namespace, combinations: Sequence[Combination]) -> int:
    """The exit code."""
    if distributed.launched_world_size() > 1:
        raise UserError(
            "A sweep starts the ranks of its runs itself; start it without a launcher, and write --ranks N."
        )
    num_ranks = args.ranks or max(torch.cuda.device_count(), 1)
    check = training.check_settings if args.slurm or args.table else training.check  # these need no data here
    for combination in combinations:
        check(combination.config, num_ranks)
    if args.slurm:
        print(batch_script(combinations), end="")
        return 0
    refuse_unwritable(folder_of(combinations))
    problems: dict[str, str] = {}
    for combination in [] if args.table else combinations:
        try:
            if problem := trained(combination, num_ranks):
                problems[combination.name] = problem
        except Preempted:
            write(combinations, problems)
            print("stopped; the same command goes on from here", file=sys.stderr)
            return PREEMPTED
        write(combinations, problems)
    rows = write(combinations, problems)
    print_rows(rows)
    print(f"written to {folder_of(combinations) / 'sweep.md'} and sweep.json", file=sys.stderr)
    return INCOMPLETE if any(row.problem for row in rows) else 0


def trained(combination: Combination, num_ranks: int) -> str | None:
    """Why it failed, in a sentence, if it did."""
    done, problem = is_done(combination)
    if done:
        print(f"{combination.name} is finished", file=sys.stderr)
    if done or problem:
        return problem
    arguments = ["--config", str(combination.recipe), *combination.overrides]
    return run_door("pretrain", arguments, num_ranks=num_ranks, name=combination.name, environment=IN_OUT)


def is_done(combination: Combination) -> tuple[bool, str | None]:
    """And why nobody can say so, where its checkpoints cannot be used."""
    try:
        return is_finished_as(combination.config, options_for(combination.config.objective["name"])), None
    except UserError as error:
        return False, str(error)


def batch_script(combinations: Sequence[Combination]) -> str:
    """For `sbatch`: an array with an index for each combination, which requeues what was pre-empted."""
    script = Path(DOORS, "pretrain.py")
    cases = []
    for number, combination in enumerate(combinations):
        absolute = [f"run_dir={Path(combination.config.run_dir).absolute()}", *combination.overrides[1:]]
        cases.append(f"    {number}) settings=({shlex.join(absolute)}) ;;")
    config = shlex.quote(str(combination.recipe.absolute()))
    return "\n".join(
        [
            "#!/bin/bash",
            "# Nodes, tasks and GPUs are to be filled in: sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 FILE",
            f"#SBATCH --job-name=sweep --array=0-{len(combinations) - 1} --requeue --open-mode=append",
            "#SBATCH --signal=SIGUSR1@180",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f"srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} {shlex.quote(str(script))} \\",
            f'    --config {config} "${{settings[@]}}"',
            "code=$?",
            "if [ $code -eq 75 ]; then",
            '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            "fi",
            "exit $code",
            "",
        ]
    )


# ---- what came of them


def row_of(combination: Combination, problem: str | None) -> Row:
    run = Path(combination.config.run_dir)
    curves = {curve.name: curve for curve in curves_of(run)}
    loss, steps = curves.get("loss"), 0
    if loss:
        steps = loss.steps[-1]
        last = [v for s, v in zip(loss.steps, loss.values, strict=True) if s > (1 - SMOOTHED) * steps]
        loss = sum(last) / len(last)
    probes = {
        name: (curves[f"online/{name}"].values[-1], curves[f"online/{name}_se"].values[-1])
        for name in PROBES
        if f"online/{name}" in curves
    }
    finished, unusable = is_done(combination)
    return Row(combination, steps, loss, probes, finished, problem or unusable)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By the first probe, best first; then those without one, in the order of the sweep. A loss orders nothing: it is
    another quantity under other settings of its objective."""
    return sorted(rows, key=lambda row: -row.probes[PROBES[0]][0] if PROBES[0] in row.probes else 1.0)


def write(combinations: Sequence[Combination], problems: dict[str, str]) -> list[Row]:
    rows = in_order([row_of(combination, problems.get(combination.name)) for combination in combinations])
    out = folder_of(combinations)
    titles, cells = table_of(rows)
    lines = [f"| {' | '.join(titles)} |", f"|{'---:|' * len(titles)}"]
    lines += [f"| {' | '.join(cell if _NUMBER.match(cell) else plain(cell) for cell in row)} |" for row in cells]
    problems_told = [f"- {plain(row.combination.name)}: {plain(row.problem)}" for row in rows if row.problem]
    values = [
        {
            "run_dir": row.combination.config.run_dir,
            "values": row.combination.values,
            "steps": row.steps,
            "finished": row.finished,
            "loss": row.loss,
            "online": {name: {"value": value, "se": se} for name, (value, se) in row.probes.items()},
            "problem": row.problem,
        }
        for row in rows
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "sweep.md", "\n".join([*lines, *(["", *problems_told] if problems_told else []), ""]))
        write_whole(out / "sweep.json", json.dumps(values, indent=1) + "\n")
    except OSError as error:
        instead = remedy(error, "choose another folder")
        raise UserError(f"--out {out} cannot be written ({reason(error)}); {instead}.") from None
    return rows


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells."""
    keys = list(rows[0].combination.values)
    probes = [name for name in PROBES if any(name in row.probes for row in rows)]
    cells = []
    for row in rows:
        found = [f"{row.probes[name][0]:.1f} ± {row.probes[name][1]:.1f}" if name in row.probes else NOTHING
                 for name in probes]  # fmt: skip
        values = [value if isinstance(value, str) else json.dumps(value) for value in row.combination.values.values()]
        state = "failed" if row.problem else "" if row.finished else "unfinished" if row.steps else "not begun"
        loss = NOTHING if row.loss is None else f"{row.loss:.4f}"
        cells.append([*values, *found, loss, f"{row.steps} {state}".strip()])
    return [*keys, *(TITLES[name] for name in probes), "loss", "steps"], cells


def print_rows(rows: Sequence[Row]) -> None:
    titles, cells = table_of(rows)
    table = PlainTable(box=box.SIMPLE, pad_edge=False)
    for title in titles:
        table.add_column(Text(title), justify="right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for row in rows:
        if row.problem:
            print_plain(console, f"{row.combination.name}: {row.problem}")


def folder_of(combinations: Sequence[Combination]) -> Path:
    return Path(combinations[0].config.run_dir).parent
