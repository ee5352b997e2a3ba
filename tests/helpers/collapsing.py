"""An objective from outside the project: MAE whose features are equal from one step on, as far as the log can tell."""

from prelude.objectives.mae import MAE
from prelude.pretrain.objective import Loss

HEALTHY_STEPS = 30


class LateCollapse(MAE):
    remedies = {"same_features": "change objective.decoder_dim"}

    def forward(self, batch, progress):
        loss = super().forward(batch, progress)
        cosine = loss.total.new_tensor(0.5 if progress.step < HEALTHY_STEPS else 1.0)
        return Loss(loss.total, loss.parts | {"feature_cosine": cosine})
