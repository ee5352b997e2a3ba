"""A run's masked autoencoder, whole: its decoder is no part of what evaluations open."""

import json

import torch
from safetensors import SafetensorError
from torch import Tensor

from prelude.checkpoints import manifest
from prelude.checkpoints.saved import open_tensors
from prelude.checkpoints.source_names import FOLDER, RANDOM, START, has_folder, path_of
from prelude.checkpoints.sources import checkpoint_of
from prelude.data.batch import ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.progress import progress_bar
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.hidden_errors import errors_by_patch
from prelude.evaluators.features.extraction import autocast
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.objectives.mae import MAE
from prelude.pretrain.images import images as device_images
from prelude.pretrain.recipes import validate_config

BATCH = 64


def open_autoencoder(source: str) -> MAE | None:
    """That of a checkpoint, or of a run's newest one; None for a source that is neither (an export has no decoder), or
    not of MAE. Raises UserError for a damaged checkpoint."""
    own = has_folder(source) and not source.startswith((RANDOM, START, FOLDER))
    checkpoint = checkpoint_of(path_of(source)) if own else None
    if checkpoint is None:
        return None
    config = json.loads((checkpoint / manifest.STATE).read_text())["meta"]["config"]
    if config.get("objective", {}).get("name") != "mae":
        return None
    model = build_objective(validate_config(config, f"the config of {checkpoint}", options_for, recorded=True))
    try:
        model.load_state_dict(dict(open_tensors(checkpoint)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint} does not hold the autoencoder of its config ({error}); write another run."
        ) from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hidden_errors(
    model: MAE, index: ShardIndex, plan: ViewPlan, sample_ids: Tensor, num_masks: int, device: torch.device | str
) -> Tensor:
    """(N, rows, columns) of the samples as `plan` shows them; an image's masks depend on its place in the index."""
    model = model.to(device)

    def fill(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(torch.device(device)):
            found = model.reconstruct(images, noise)
        return found.mask.removed, (model.restored(found) - found.pixels).square().mean(2)

    found = []
    with progress_bar("filling in images", len(sample_ids)) as advance:
        for batch in one_pass(index, plan, batch_size=BATCH, samples=sample_ids.numpy()):
            (images,) = device_images(batch.to(device), plan)
            found.append(errors_by_patch(fill, images, batch.sample_ids.to(device), model.num_patches, num_masks).cpu())
            advance(len(batch))
    return torch.cat(found).unflatten(1, model.grid)
