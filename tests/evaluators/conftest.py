import pytest
import torch

from prelude.evaluators.features.extraction import Features


def gaussian_classes(num_samples: int, width: int, num_classes: int, seed: int, noise: float = 1.0):
    """Overlapping classes with strongly correlated features, as those of an encoder are. Centres do not depend on
    `seed`, so that two seeds are a train and a test set."""
    shared = torch.Generator().manual_seed(width * 1000 + num_classes)
    centres = torch.randn(num_classes, width, generator=shared)
    mixing = torch.randn(width, width, generator=shared) * torch.logspace(0, -2, width)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    values = centres[labels] + noise * torch.randn(num_samples, width, generator=generator)
    return values @ mixing + 3.0, labels


def features_of(values, labels, name: str = "mean", fingerprint: str = "shards") -> Features:
    return Features(values, labels, torch.arange(len(labels)), fingerprint, name)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads an index or a bank that another one, or the user, has left behind."""
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def problem():
    """(train, test) by kind: `mean` separates ten classes, `cls` is noise."""
    parts = []
    for seed, count in ((1, 900), (2, 400)):
        values, labels = gaussian_classes(count, 24, 10, seed, noise=1.5)
        useless = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
        parts.append({"cls": features_of(useless, labels, "cls"), "mean": features_of(values, labels)})
    return tuple(parts)


@pytest.fixture
def classes():
    return gaussian_classes


@pytest.fixture
def features():
    return features_of
