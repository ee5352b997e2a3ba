"""A run's masked autoencoder, whole: its decoder is no part of what evaluations open."""

import json

import torch
from safetensors import SafetensorError
from torch import Tensor

from prelude.checkpoints import manifest
from prelude.checkpoints.saved import open_tensors
from prelude.checkpoints.store import Store
from prelude.data.batch import ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.progress import progress_bar
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.hidden_errors import errors_by_patch
from prelude.evaluators.judging import run_of
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.objectives.mae import MAE
from prelude.pretrain.images import images as device_images
from prelude.pretrain.recipes import validate_config

BATCH = 64


def open_autoencoder(source: str) -> MAE | None:
    """The newest one of a run; None for a source that is no run of MAE. Raises UserError for a damaged checkpoint."""
    run = None if source.startswith(("random:", "start:")) else run_of(source)
    newest = Store(run / "checkpoints").newest() if run else None
    if newest is None:
        return None
    config = json.loads((newest / manifest.STATE).read_text())["meta"]["config"]
    if config.get("objective", {}).get("name") != "mae":
        return None
    model = build_objective(validate_config(config, f"the config of {run}", options_for))
    try:
        model.load_state_dict(dict(open_tensors(newest)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{newest} does not hold the autoencoder of its config ({error}); write another run.") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hidden_errors(
    model: MAE, index: ShardIndex, plan: ViewPlan, sample_ids: Tensor, num_masks: int, device: torch.device | str
) -> Tensor:
    """(N, rows, columns) of the samples as `plan` shows them; an image's masks depend on its place in the index."""
    model = model.to(device)

    def fill(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        found = model.reconstruct(images, noise)
        return found.mask.removed, (model.restored(found) - found.pixels).square().mean(2)

    found = []
    with progress_bar("filling in images", len(sample_ids)) as advance:
        for batch in one_pass(index, plan, batch_size=BATCH, samples=sample_ids.numpy()):
            (images,) = device_images(batch.to(device), plan)
            found.append(errors_by_patch(fill, images, batch.sample_ids.to(device), model.num_patches, num_masks).cpu())
            advance(len(batch))
    return torch.cat(found).unflatten(1, model.grid)
