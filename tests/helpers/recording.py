"""An objective from outside the project: MAE that also writes down, for every sample, what was drawn for it.

Named in a config as `recording:RecordingMAE`, it shows that nothing of ours has to be edited for a new one.
"""

import json
import os
from pathlib import Path

from prelude.objectives.mae import MAE
from prelude.objectives.masking import mask_noise, random_mask
from prelude.pretrain import distributed


class RecordingMAE(MAE):
    def forward(self, batch, progress):
        mask = random_mask(mask_noise(batch.seeds, self.num_patches), self.num_keep)
        path = Path(os.environ["RECORD_TO"]) / f"rank{distributed.rank()}.jsonl"
        with open(path, "a") as file:
            for i in range(len(batch)):
                record = {
                    "position": batch.positions[i].item(),
                    "sample": batch.sample_ids[i].item(),
                    "crop": batch.boxes[i].tolist(),
                    "flip": batch.flips[i].tolist(),
                    "mask": mask.keep[i].tolist(),
                    "pixels": batch.views[0][i].sum().item(),
                    "step": progress.step,
                }
                file.write(json.dumps(record) + "\n")
        return super().forward(batch, progress)
