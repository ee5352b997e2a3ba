import resource

import numpy as np

from prelude.pretrain.environment import peak_memory


def test_peak_memory_counts_what_was_held_and_given_back():
    before = peak_memory()
    size = max(before, 2**27)
    held = np.ones(size, np.uint8)  # written, hence resident
    del held
    after = peak_memory()
    assert after >= size and after > before
    assert after <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.01  # never more than the system says
