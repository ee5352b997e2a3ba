"""A recipe's schedule squeezed or stretched into a number of images, so that recipes can be compared at equal cost."""

import json
import math

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.schedules import beginning


def within(config: Config, num_images: int, num_samples: int) -> list[str]:
    """Overrides that make `config` see `num_images` images (repeats counted, whole batches) of a data set of
    `num_samples`. Warm-up, milestones and the steps in which the encoder is held still keep their place in the run; the
    cosine ends with it as ever.

    Raises UserError for fewer images than a batch.
    """
    batch = config.train.global_batch
    if num_images < batch:
        raise UserError(
            f"{counted(num_images, 'image')} cannot make one batch of train.global_batch={batch}; write {batch} or "
            f"more."
        )
    steps = math.ceil(num_images / batch)
    epochs = steps * batch / num_samples
    while math.ceil(epochs * (num_samples / batch)) > steps:  # rounding must not add a step
        epochs = math.nextafter(epochs, 0)
    factor = epochs / config.train.epochs
    overrides = [f"train.epochs={epochs!r}"]
    if config.optimizer.warmup_epochs:
        overrides.append(f"optimizer.warmup_epochs={config.optimizer.warmup_epochs * factor!r}")
    if config.optimizer.milestones:
        milestones = [milestone * factor for milestone in config.optimizer.milestones]
        overrides.append(f"optimizer.milestones={json.dumps(milestones)}")
    if config.train.freeze_encoder_steps:
        usual = beginning(config, num_samples).num_steps
        overrides.append(f"train.freeze_encoder_steps={config.train.freeze_encoder_steps * steps // usual}")
    return overrides
