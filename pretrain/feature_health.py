"""Signs that features collapse, which a loss against a moving teacher does not show: it is lowest when all is equal.

The names of these numbers among the parts of a loss are what `pretrain.collapse` watches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# A part of a loss under this name is the loss that a model would have that ignores the image, on the same batch.
TRIVIAL_LOSS = "trivial_loss"

FEWEST_RANKED = 3  # vectors: two have one direction between them, whatever they are

# Before the names of these numbers where they are of volumes, which take turns with images.
OF_VOLUMES = "volume_"


@torch.no_grad()
def feature_health(features: Tensor) -> dict[str, Tensor]:
    """Of one feature vector an image, (B, D), over this rank's micro-batch; of one image nothing, and of two no rank,
    since there is nothing that could differ:

    `feature_std`: standard deviation over images, averaged over dimensions; 0 when all images look alike.
    `feature_rank`: (sum of eigenvalues)^2 / (sum of their squares) of the covariance, from 1 (all on one line) to
    min(B - 1, D).
    `feature_rank_share`: the same on a scale from 0 (all on one line) to 1 (all that is attainable).
    `feature_cosine`: mean cosine similarity of two images; 1 when all point the same way.
    """
    count = len(features)
    if count < 2:
        return {}
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        centred = features - features.mean(0)
        small = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        directions = F.normalize(features, dim=1)
        rank = centred.square().sum().square() / small.square().sum().clamp(min=1e-30)
        found = {
            "feature_std": centred.square().mean(0).sqrt().mean(),
            "feature_rank": rank,
            "feature_rank_share": rank_share(rank, count, features.shape[1]),
            "feature_cosine": (directions.sum(0).square().sum() - count) / (count * (count - 1)),
        }
    return found if count >= FEWEST_RANKED else {name: found[name] for name in ("feature_std", "feature_cosine")}


def rank_share(rank: Tensor, count: int, width: int) -> Tensor:
    """A rank of `count` vectors of `width` dimensions as a share of what is attainable: 0 at rank 1, 1 at the most."""
    return (rank - 1).clamp(min=0) / max(min(count - 1, width) - 1, 1)


@torch.no_grad()
def teacher_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine similarity of what student and teacher make of the same patches of an image, each averaged over them.

    student, teacher: (B, K, D). Returns (B,).
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.cosine_similarity(student.float().mean(1), teacher.float().mean(1), dim=1)
