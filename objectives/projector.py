"""The head between an encoder's features and the space in which views are compared."""

from typing import Literal

from torch import nn

Bias = Literal["none", "hidden", "all"]  # which linear layers have one


def projector(in_features: int, widths: list[int], bias: Bias = "none") -> nn.Sequential:
    """Linear layers, batch norm and ReLU between them, nothing after the last (arXiv 2103.03230, section 3 and code).

    bias: of which layers; `hidden` is all but the last, as in the code of VICReg (arXiv 2105.04906).
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width, bias=bias != "none"), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=bias == "all"))
