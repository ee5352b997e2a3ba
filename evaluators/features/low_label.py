"""Few labels: a seeded part of a labelled set with the same share of every class.

Parts of one seed are nested: a smaller one lies inside every larger one, so that curves over the number of labels
are not made noisier by other images.
"""

import numpy as np

from prelude.data.errors import UserError


def low_label(
    classes: np.ndarray, *, per_class: int | None = None, fraction: float | None = None, seed: int = 0
) -> np.ndarray:
    """Sample ids, growing, of `per_class` samples of each class or of `fraction` of each (rounded, at least one).

    classes: (N,) class numbers of 0 or more. Raises UserError for a class with fewer than `per_class` samples.
    """
    if per_class is None and fraction is None:
        return np.arange(len(classes))
    numbers, member, count = np.unique(classes, return_inverse=True, return_counts=True)
    if per_class is not None and count.min() < per_class:
        scarce = numbers[count.argmin()]
        raise UserError(
            f"Class {scarce} has {count.min()} training images, fewer than objective.per_class={per_class}; write "
            f"objective.per_class={count.min()} or less."
        )
    wanted = np.full_like(count, per_class) if per_class is not None else np.maximum(np.rint(count * fraction), 1)
    # The raw words of Philox, unlike the draws of numpy's Generator, are promised never to change.
    words = np.random.Philox(key=seed).random_raw(len(classes))
    order = np.lexsort((words, member))  # by class, and within it in an order of its own
    first = np.cumsum(count) - count
    place = np.arange(len(classes)) - first[member[order]]
    return np.sort(order[place < wanted[member[order]]])
