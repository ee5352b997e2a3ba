"""`train.compile`: what of an objective goes through torch.compile.

- The forward pass, as one graph; not what hangs on the module's call, for DeepSpeed's hooks there would break it.
- Where what it does on the host would break the graph, or change it in every step (colours drawn for some of the
  images, blocks whose size is drawn), its networks alone (`compiled_parts`).
- Where lengths change from step to step (`lengths_change`), they are variables to the compiler: one graph serves all
  blocks of a kind and all steps, and it is compiled in the time of a block.
"""

import torch

from prelude.pretrain.objective import Objective


def compile_objective(objective: Objective, backend: str = "inductor") -> None:
    parts = objective.compiled_parts()
    for part in parts:
        part.compile(dynamic=objective.lengths_change or None, backend=backend)
    if not parts:
        objective.forward = torch.compile(objective.forward, backend=backend)


def advice(device: torch.device) -> str:
    """What a person should know who waits for a compiler."""
    if device.type == "cuda":
        return "the first steps wait for the compiler; on an H100 50 s of it made steps of MAE 1.4 times as fast"
    return (
        "on a CPU SparK became 1.14 times as fast after 53 s of it, MAE 1.03, and Barlow Twins slower; "
        "benchmarks/compile.py measures what it does here"
    )
