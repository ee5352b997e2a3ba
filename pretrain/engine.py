"""The training loop: one objective, one loader, one store, any number of ranks.

- One counter, `progress.step`, drives schedules, data position and checkpoints; a run of S steps has the same
  samples, crops, masks and learning rates at any number of ranks and after any interruption.
- A step whose loss or gradient is not finite is not applied, on any rank; too many in a row stop the run.
- SIGTERM, SIGUSR1, Ctrl-C or a file named STOP in the run folder end the run after the current step, with a
  checkpoint.
- All ranks have the same data, config and code, or none of them begins.
- The engine is handed its parts and imports none of their modules.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from prelude.data.errors import RunStopped, UserError
from prelude.pretrain import attendance, deepspeed_config, distributed, optimizers, precision, stopping
from prelude.pretrain.config import Config
from prelude.pretrain.environment import describe_code, peak_memory
from prelude.pretrain.monitors import Monitor, StepRecord
from prelude.pretrain.objective import Objective
from prelude.pretrain.resume import changed_settings, refuse_changed_config
from prelude.pretrain.sameness import refuse_differences
from prelude.pretrain.schedules import Progress


@dataclass(frozen=True)
class Outcome:
    reason: Literal["finished", "preempted"]
    step: int


class Engine:
    """Trains `objective` on `loader`'s batches as `config` says; see `run`."""

    def __init__(self, config: Config, objective: Objective, loader, store, monitors: list[Monitor]):
        self.config, self.loader, self.store, self.monitors = config, loader, store, monitors
        self.run_dir = Path(config.run_dir)
        self.device = distributed.device()
        self.micro_batch, self.accumulation = config.batching(distributed.world_size())
        if self.accumulation > 1 and not objective.accumulates:
            raise UserError(
                f"objective.name={config.objective['name']} takes its loss over the whole batch, which accumulating "
                f"{self.accumulation} micro-batches would change; write train.micro_batch=auto."
            )
        steps_per_epoch = loader.num_samples / config.train.global_batch
        num_steps = max(-int(-config.train.epochs * steps_per_epoch // 1), 1)
        self.progress = Progress(0, num_steps, steps_per_epoch)
        self._refuse_other_ranks()
        self.objective = objective
        self.deepspeed = self._initialise_deepspeed(objective)
        self.stop_reason = ""  # of a monitor, on rank 0
        self.nonfinite_in_a_row = 0
        self.skipped_steps = 0
        self.peak_memory = 0

    def run(self) -> Outcome:
        """Trains to the end, or until asked to stop. Collective. Raises RunStopped when it cannot go on."""
        with distributed.explained():
            self._resume()
        for monitor in self.monitors:
            monitor.start(self.progress)
        self._hand_over_encoder()
        try:
            with stopping.postponed(), distributed.explained():
                return self._train()
        finally:
            for monitor in self.monitors:
                monitor.close()

    def _train(self) -> Outcome:
        meter = Meter(self.config.train.global_batch)
        batches = iter(self.loader)
        while self.progress.step < self.progress.num_steps:
            record = self._step(batches, meter)
            self._watch(record, meter)
            finished, stop = self.progress.step == self.progress.num_steps, record.stop
            if finished or stop or self.progress.step % self.config.checkpoint.every_steps == 0:
                self._save()
                # Who asks for the end while a checkpoint is written has it: no step more, and no second save.
                stop = stop or any(distributed.total(self._asked_to_stop()))
            if stop and not finished:
                return Outcome("preempted", self.progress.step)
        for monitor in self.monitors:
            monitor.finish()
        self._pass_on_reports()
        return Outcome("finished", self.progress.step)

    # ---- one optimizer step

    def _step(self, batches, meter: "Meter") -> "_Agreed":
        torch.manual_seed(self._step_seed())
        self.lr, self.weight_decay = optimizers.apply_schedule(
            self.deepspeed.optimizer.param_groups, self.config, self.progress
        )
        loss_sum = torch.zeros((), device=self.device)
        step = self.progress.step + 1
        for micro in range(self.accumulation):
            attendance.reach("waiting for data", step)
            with meter.waiting_for_data():
                batch = next(batches)
            self.last_batch = batch = batch.to(self.device)
            attendance.reach("in the forward pass", step)
            loss = self.deepspeed(batch, self.progress)
            attendance.reach("in the backward pass", step)
            self.deepspeed.backward(loss.total)
            loss_sum += loss.total.detach()
            at_boundary = micro == self.accumulation - 1
            applied = self._apply_gradients(at_boundary)
        self.parts = loss.parts
        self.progress = Progress(self.progress.step + 1, self.progress.num_steps, self.progress.steps_per_epoch)
        if applied:
            self.objective.after_step(self.progress)
        meter.step_done()
        return self._agree(loss_sum / self.accumulation, applied)

    def _apply_gradients(self, at_boundary: bool) -> bool:
        """Steps the optimizer at the boundary. Returns whether the weights moved; the same on all ranks."""
        if at_boundary and self.config.train.zero_stage == 0:
            return self._step_at_stage_0()
        self.deepspeed.step()
        if not at_boundary:
            return False
        self.grad_norm = float(self.deepspeed.get_global_grad_norm())
        return self.deepspeed.was_step_applied()

    def _step_at_stage_0(self) -> bool:
        """Without ZeRO nothing below us looks at the gradients, so they are measured, clipped or refused here.

        They are averaged over ranks already: every rank sees the same norm and decides alike.
        """
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        if scaler:
            scaler.unscale_(self.deepspeed.optimizer)
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.grad_norm = norm.item()
        finite = self.grad_norm < float("inf")
        if finite and self.config.train.gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.train.gradient_clipping, norm)
        if not finite and not scaler:
            # Optimizers pass over parameters without a gradient; DeepSpeed's own counters still advance.
            for parameter in parameters:
                parameter.grad = None
        self.deepspeed.step()  # a loss scaler skips non-finite gradients itself, and lowers its scale
        return finite

    def _agree(self, loss: torch.Tensor, applied: bool) -> "_Agreed":
        """One small collective a step: the mean loss, and whether any rank was asked to stop.

        Raises RunStopped, on all ranks alike.
        """
        stop = self._asked_to_stop()
        attendance.reach("ending the step", self.progress.step)
        bad, read = self.loader.bad.num_bad, self.loader.bad.num_read
        memory = [0] * distributed.world_size()  # a sum with one entry a rank also has their maximum
        memory[distributed.rank()] = peak_memory() if self._is_logged() else 0
        loss_sum, stops, bad, read, refused, *memory = distributed.total(
            loss.item(), stop, bad, read, bool(self.stop_reason), *memory
        )
        self.peak_memory = int(max(self.peak_memory, *memory))
        if refused:
            raise RunStopped(distributed.from_main(self.stop_reason))
        self.nonfinite_in_a_row = 0 if applied else self.nonfinite_in_a_row + 1
        self.skipped_steps += not applied
        if self.nonfinite_in_a_row >= self.config.train.max_nonfinite_steps:
            raise RunStopped(
                f"The loss or its gradient was not finite in {self.nonfinite_in_a_row} steps in a row, the last being "
                f"step {self.progress.step}; the last good checkpoint is {self._last_checkpoint()}. "
                "Lower optimizer.lr, or write train.precision=fp32."
            )
        if read and bad / read > self.config.data.max_bad_share and bad > self.micro_batch:
            raise RunStopped(
                f"{bad:.0f} of {read:.0f} samples could not be read, more than data.max_bad_share="
                f"{self.config.data.max_bad_share}; see {self.run_dir / 'bad_samples.jsonl'}."
            )
        return _Agreed(loss_sum / distributed.world_size(), bool(stops), int(bad))

    def _asked_to_stop(self) -> bool:
        return stopping.requested() or (distributed.is_main() and (self.run_dir / "STOP").exists())

    def _step_seed(self) -> int:
        """Seeds what draws from torch's global generator (drop path), so that no generator's state is saved."""
        return (self.config.seed << 32) + self.progress.step * 4096 + distributed.rank()

    # ---- watching

    def _watch(self, agreed: "_Agreed", meter: "Meter") -> None:
        if not self.monitors:
            return
        step, last = self.progress.step, self.progress.step == self.progress.num_steps
        if self._is_logged() or agreed.stop:
            speed, data_wait = meter.read()
            record = StepRecord(
                step=step,
                num_steps=self.progress.num_steps,
                epoch=self.progress.epoch,
                loss=agreed.loss,
                parts={name: float(value) for name, value in self.parts.items()},
                lr=self.lr,
                weight_decay=self.weight_decay,
                grad_norm=self.grad_norm,
                images_per_second=speed,
                data_wait=data_wait,
                eta_seconds=(self.progress.num_steps - step) * meter.seconds_per_step(),
                skipped_steps=self.skipped_steps,
                bad_samples=agreed.bad_samples,
                peak_memory=self.peak_memory or peak_memory(),
            )
            for monitor in self.monitors:
                monitor.record(record)
        every = self.config.log.pictures_every_steps
        if every and (step % every == 0 or last) and self.config.train.zero_stage < 3:
            with torch.no_grad():
                pictures = self.objective.pictures(self.last_batch.head(8))
            for monitor in self.monitors:
                monitor.pictures(step, pictures)
        self._hand_over_encoder()
        self._pass_on_reports()

    def _is_logged(self) -> bool:
        step = self.progress.step
        return step % self.config.log.every_steps == 0 or step == self.progress.num_steps

    def _hand_over_encoder(self) -> None:
        """Copies of the exported encoder's weights, to those who ask: whatever becomes of them, training goes on."""
        takers = [monitor for monitor in self.monitors if monitor.wants_encoder(self.progress)]
        for monitor in takers:
            weights = self.objective.exported_encoder().state_dict()
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
            monitor.encoder(self.progress.step, copies)

    def _pass_on_reports(self) -> None:
        for finder in self.monitors:
            for report in finder.found():
                for monitor in self.monitors:
                    monitor.report(report)
                if report.stop:
                    self.stop_reason = report.text

    # ---- saving and resuming

    def _save(self) -> None:
        attendance.reach("saving the checkpoint", self.progress.step)
        meta = {
            "step": self.progress.step,
            "num_steps": self.progress.num_steps,
            "config": self.config.model_dump(mode="json"),
            "encoder": self.config.encoder.model_dump(mode="json"),
            "exported": self._exported_prefix(),
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
            "loader": self.loader.state_dict(),
        }
        path = self.store.save(self.progress.step, self.deepspeed, meta)
        attendance.saved(str(path))
        for monitor in self.monitors:
            monitor.saved(self.progress.step, path)

    def _resume(self) -> None:
        """Goes on from the run's newest valid checkpoint, or from the one that is named; else from the start."""
        named = self.config.resume.checkpoint
        newest = self.store.newest if named == "auto" else lambda: Path(named)
        attendance.reach("looking for a checkpoint")
        path = distributed.from_main(newest() if distributed.is_main() else None)
        attendance.saved("none: none had been written" if path is None else str(path))
        if path is None:
            return
        attendance.reach("loading a checkpoint")
        meta = self.store.load(path, self.deepspeed)
        if not self.config.resume.allow_changed_config:
            refuse_changed_config(changed_settings(meta["config"], self.config), path)
        self.loader.load_state_dict(meta["loader"], allow_changed_data=self.config.resume.allow_changed_data)
        self.progress = Progress(meta["step"], self.progress.num_steps, self.progress.steps_per_epoch)

    def _exported_prefix(self) -> str:
        exported = self.objective.exported_encoder()
        return next(name for name, module in self.objective.named_modules() if module is exported) + "."

    def _last_checkpoint(self) -> str:
        return str(self.store.newest() or "none: no checkpoint had been written")

    # ---- starting

    def _refuse_other_ranks(self) -> None:
        facts = {"config": self.config.model_dump(mode="json"), "code": describe_code()}
        facts |= {"data": self.loader.state_dict(), "num_steps": self.progress.num_steps}
        refuse_differences(facts)

    def _initialise_deepspeed(self, objective: Objective):
        import deepspeed

        train = self.config.train
        if train.gradient_checkpointing:
            objective.encoder.set_grad_checkpointing(True)
        if train.compile:
            objective.compile()
        objective.to(self.device)
        settings = deepspeed_config.build(
            self.config,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            precision=precision.resolve(self.config, self.device),
            numel=sum(p.numel() for p in objective.parameters()),
        )
        with distributed.nothing_printed():
            optimizer = optimizers.build_optimizer(objective, self.config, objective.lr_scales())
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        return engine


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know after a step."""

    loss: float
    stop: bool
    bad_samples: int


class Meter:
    """Images a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, global_batch: int):
        self.global_batch = global_batch
        self.started, self.total_steps = time.perf_counter(), 0
        self._reset()

    def waiting_for_data(self) -> "Meter":
        return self

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.waited += time.perf_counter() - self.entered

    def step_done(self) -> None:
        self.steps += 1
        self.total_steps += 1

    def seconds_per_step(self) -> float:
        """On average since the start, saving and pictures included: what an ETA is made of."""
        return (time.perf_counter() - self.started) / self.total_steps

    def read(self) -> tuple[float, float]:
        elapsed = time.perf_counter() - self.since
        speed, data_wait = self.steps * self.global_batch / elapsed, self.waited / elapsed
        self._reset()
        return speed, data_wait

    def _reset(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0
