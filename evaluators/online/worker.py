"""The process beside a run that judges its encoder on a small labelled subset, see `evaluators.online.monitor`.

    python -m prelude.evaluators.online.worker

The first line on its standard input is the run's config. It keeps the subset's images as uint8, and answers each line
that follows (`{"step": 100, "weights": FILE}`) by one on its standard output (`{"step": 100, "text": ..., "numbers":
...}`, or `{"error": ...}` before it ends). It ends with its standard input, in the middle of an evaluation too.
"""

import json
import os
import queue
import signal
import sys
import threading
import time

import torch
from safetensors.torch import load_file
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.batch import Batch
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import one_pass
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.shards import ShardIndex
from prelude.data.subset import balanced_subset
from prelude.evaluators.features.extraction import Features, encode, evaluation_plan, suited_kinds
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.labelled import labelled_section, leaks
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.feature_health import feature_health

NICENESS = 10
BATCH_SIZE = 128


class Judge:
    """What the encoder of a run is worth on its subset, whenever weights are brought.

    The numbers are those that `prelude knn` and `prelude probe` would give on the same images with the run's seed.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.section, self.device = config, config.evaluate, device
        self.model = build_encoder(config.encoder, seed=0).requires_grad_(False).eval()
        section = config.evaluate
        seen = config.data
        indexes = labelled_section(section, seen.range, seen.max_pixels, seen.channels).indexes()
        wanted = (section.num_train, section.num_test)
        self.parts = [self._images(index, count) for index, count in zip(indexes, wanted, strict=True)]
        self.leaks = leaks(*indexes)  # in sentences

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """knn, linear: percent, with their standard errors; the health of the train images' features."""
        try:
            return self._judged(weights)
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the run beside us may need it before the next evaluation

    def _judged(self, weights: dict[str, Tensor]) -> dict[str, float]:
        started = time.monotonic()
        self.model.load_state_dict(weights, strict=True)
        train, test = (self._features(*part) for part in self.parts)
        seed, device = self.config.seed, self.device
        numbers = {}
        for name, evaluator in (("knn", knn), ("linear", linear_probe)):
            top1 = evaluator(train, test, seed=seed, device=device).numbers["top1"]
            numbers |= {name: top1.value, f"{name}_se": top1.se}
        pooled = train[suited_kinds(self._encoder())[-1]].values
        numbers |= {name: value.item() for name, value in feature_health(pooled).items()}
        return numbers | {"seconds": round(time.monotonic() - started, 3)}

    def _images(self, index: ShardIndex, count: int) -> tuple[list[Batch], str, str]:
        label = self.section.label
        samples = balanced_subset(index, label, count, self.config.seed)
        plan = evaluation_plan(self._encoder())
        batches = list(one_pass(index, plan, batch_size=BATCH_SIZE, label=label, samples=samples))
        return batches, index.fingerprint, index.named

    def _features(self, batches: list[Batch], fingerprint: str, shards: str) -> dict[str, Features]:
        num_samples = sum(map(len, batches))
        about = num_samples, fingerprint, self.section.label
        return encode(self._encoder(), batches, *about, device=self.device, shards=shards)

    def _encoder(self) -> OpenedEncoder:
        data = self.config.data
        known = {"name": "the run's encoder", "fingerprint": "", "objective": self.config.objective["name"]}
        return OpenedEncoder(self.model, self.config.encoder, data.mean, data.std, **known)


def main() -> int:
    answers = _own_standard_output()
    os.nice(NICENESS)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # the run finishes its step and ends us
    wanted: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(wanted,), daemon=True).start()

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        config = Config.model_validate(wanted.get()["config"])
        keep_remote_shards(config.data.cache_dir, config.data.cache_gib)
        device = torch.device("cpu") if config.evaluate.device == "cpu" else distributed.device()
        judge = Judge(config, device)
        for sentence in judge.leaks:
            answer(notice=f"online evaluation: {sentence}")
        while True:
            asked = wanted.get()
            numbers = judge(load_file(asked["weights"]))
            answer(step=asked["step"], text=_sentence(numbers), numbers=numbers)
    except (UserError, RunStopped) as error:
        answer(error=str(error))
        return error.exit_code


def _sentence(numbers: dict[str, float]) -> str:
    return (
        f"k-NN {numbers['knn']:.1f} ± {numbers['knn_se']:.1f} %, linear {numbers['linear']:.1f} ± "
        f"{numbers['linear_se']:.1f} %, effective rank {numbers['feature_rank']:.1f}, {numbers['seconds']:.1f} s"
    )


def _own_standard_output():
    """A stream for answers alone; what libraries print goes to the log."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def _read(wanted: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        wanted.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
