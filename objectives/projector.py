"""The head between an encoder's features and the space in which two views are compared."""

from torch import nn


def projector(in_features: int, widths: list[int]) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between them, nothing after the last (arXiv 2103.03230,
    section 3 and code)."""
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=False))
