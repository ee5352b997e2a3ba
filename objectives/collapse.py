"""Signs that features collapse, which a loss against a moving teacher does not show: it is lowest when all is equal."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_health(features: Tensor) -> dict[str, Tensor]:
    """Of one feature vector an image, (B, D), over this rank's micro-batch:

    `feature_std`: standard deviation over images, averaged over dimensions; 0 when all images look alike.
    `feature_rank`: (sum of eigenvalues)^2 / (sum of their squares) of the covariance, from 1 (all on one line) to
    min(B - 1, D).
    `feature_cosine`: mean cosine similarity of two images; 1 when all point the same way.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        count = max(len(features), 2)
        centred = features - features.mean(0)
        small = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        directions = F.normalize(features, dim=1)
        return {
            "feature_std": centred.square().mean(0).sqrt().mean(),
            "feature_rank": centred.square().sum().square() / small.square().sum().clamp(min=1e-30),
            "feature_cosine": (directions.sum(0).square().sum() - len(features)) / (count * (count - 1)),
        }
