"""The training loop: one objective, one loader, one store, any number of ranks.

- One counter, `progress.step`, drives schedules, data position and checkpoints; a run of S steps has the same
  samples, crops, masks and learning rates at any number of ranks and after any interruption.
- A step whose loss or gradient is not finite is not applied, on any rank; too many in a row stop the run.
- Between two logged steps the host never waits for the device: it learns a step later whether one was applied.
- SIGTERM, SIGUSR1, Ctrl-C or a file STOP in the run folder end the run after the current step, with a checkpoint.
- A step's batches are fetched during the step before, one for each that it computes on, and before the ranks agree on
  its end: whoever gets none, or is asked to stop while waiting, says so there, and the run ends between two steps on
  all ranks alike.
- A checkpoint is written while training goes on; whether it was is learned at the end of a step, or before the next.
- All ranks have the same data, config and code, or none of them begins.
- The engine is handed its parts and imports none of their modules.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from prelude.data.batch import Batch
from prelude.data.errors import RunStopped, Stopped, UserError
from prelude.pretrain import (
    attendance,
    attention,
    deepspeed_config,
    deepspeed_engine,
    distributed,
    draws,
    named_code,
    optimizers,
    precision,
    stopping,
)
from prelude.pretrain.bad_share import refuse_many
from prelude.pretrain.config import Config
from prelude.pretrain.environment import describe_code, peak_memory
from prelude.pretrain.guarded_step import GuardedStep
from prelude.pretrain.meter import Meter
from prelude.pretrain.monitors import Monitor, Report, StepRecord
from prelude.pretrain.objective import Objective
from prelude.pretrain.profiling import StepProfile
from prelude.pretrain.resume import accept, found_checkpoint, is_own, progress_after
from prelude.pretrain.sameness import refuse_differences
from prelude.pretrain.schedules import Progress, beginning
from prelude.pretrain.transfers import Later, on_host
from prelude.pretrain.utilisation import Utilisation


@dataclass(frozen=True)
class Outcome:
    reason: Literal["finished", "preempted"]
    step: int


class Engine:
    """Trains `objective` on `loader`'s batches as `config` says; see `run`."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        loader,
        store,
        monitors: list[Monitor],
        peak_flops: Callable[[torch.device, str], float] | None = None,
    ):
        """peak_flops: that a device can do in a second, in a precision; for who wants to know how much is used."""
        self.config, self.loader, self.store, self.monitors = config, loader, store, monitors
        self.run_dir = Path(config.run_dir)
        self.stop_file = str(self.run_dir / "STOP")
        self.device = distributed.device()
        self.micro_batch, self.accumulation = config.batching(distributed.world_size())
        if self.accumulation > 1 and not objective.accumulates:
            raise UserError(
                f"objective.name={config.objective['name']} takes its loss over the whole batch, which accumulating "
                f"{self.accumulation} micro-batches would change; write train.micro_batch=auto."
            )
        self.progress = beginning(config, loader.num_samples)
        self.own_code = named_code.digests(config.encoder.name, config.objective["name"], cls=type(objective))
        self._refuse_other_ranks()
        optimizers.refuse_never_moving(config, self.progress.num_steps)
        with distributed.explained():
            self.goes_on_from, meta = found_checkpoint(self.store, config)
            if self.goes_on_from is None:
                optimizers.refuse_no_rate(config, self.progress)
            self.precision, self.notice = precision.agreed(config, self.device, meta)
        self.utilisation = Utilisation(peak_flops and peak_flops(self.device, self.precision.name))
        self.objective = objective.to(self.device).train()  # whatever mode an encoder of one's own was made in
        self.utilisation.look_at(objective, config, self.precision.name)
        self.deepspeed = deepspeed_engine.initialised(objective, config, self.precision.name)
        bucket = deepspeed_config.bucket_size(deepspeed_engine.numel(objective))
        trained, clipping = list(objective.parameters()), config.train.gradient_clipping
        self.guarded_step = GuardedStep(self.deepspeed, trained, clipping, bucket)
        self.applied = Later()
        self.stop_reason = ""  # of a monitor, on rank 0
        self.has_ended = False  # says the objective, before the last step
        self.nonfinite_in_a_row = self.skipped_steps = self.peak_memory = 0

    def run(self) -> Outcome:
        """Trains to the end, or until asked to stop. Collective. Raises RunStopped when it cannot go on."""
        with distributed.explained():
            notices = [*deepspeed_config.notices(self.config), *self._resume()]
        for monitor in self.monitors:
            monitor.start(self.progress)
        self._tell(Report(self.progress.step, "notice", text) for text in notices)
        self._hand_over_encoder()
        with stopping.postponed(besides=self.stop_wanted):  # to the end: monitors that wait for others ask about it
            try:
                with distributed.explained(), attention.kernels_for(self.objective):
                    return self._train()
            finally:
                self.store.wait()
                for monitor in self.monitors:
                    monitor.close()

    def _train(self) -> Outcome:
        meter = Meter(self.config.train.global_batch)
        profile = StepProfile(self.run_dir, self.config.train.profile_steps if distributed.is_main() else 0)
        batches = iter(self.loader)
        self._fetch_first(batches, meter)
        self._ask_for_end()
        agreed = self._agree()
        while not (self._is_finished() or agreed.stop or agreed.no_data):
            with profile:
                agreed = self._step(batches, meter)
            if agreed.saved:
                self._finish_save()
            self._watch(agreed, meter)
            ends = self._is_finished() or agreed.stop or agreed.no_data
            if ends or self.progress.step % self.config.checkpoint.every_steps == 0:
                self._save()
                # Who asks for the end while the state is copied has it: no step more, and no second save.
                if any(distributed.total(self._asked_to_stop())):
                    break
        profile.close()
        self._finish_save()
        if agreed.no_data:
            raise RunStopped(agreed.no_data)
        if not self._is_finished():
            return Outcome("preempted", self.progress.step)
        for monitor in self.monitors:
            monitor.finish()
            self._tell(monitor.found())  # those behind it have heard of all when they sum up
        self._pass_on_reports()
        return Outcome("finished", self.progress.step)

    # ---- one optimizer step

    def _step(self, batches, meter: Meter) -> "_Agreed":
        draws.reseed(self.device, self.config.seed, self.progress.step, distributed.rank())
        self.lr, self.weight_decay = optimizers.apply_schedule(
            self.deepspeed.optimizer.param_groups, self.config, self.progress
        )
        step, fetched, loss_sum = self.progress.step + 1, self.ahead, torch.zeros((), device=self.device)
        self._begin_to_fetch(step + 1)
        self.guarded_step.begin()
        for micro in range(self.accumulation):
            if micro:
                self._fetch_ahead(batches, meter)
            self.last_batch = batch = fetched.popleft().to(self.device)
            attendance.reach("in the forward pass", step)
            with self.utilisation.counting(batch):
                loss = self.deepspeed(batch, self.progress)
                attendance.reach("in the backward pass", step)
                self.deepspeed.backward(loss.total)
            loss_sum += loss.total.detach()
            self.guarded_step(at_boundary=micro == self.accumulation - 1)
        self.loss, self.parts = loss_sum / self.accumulation, loss.parts
        self.progress = Progress(step, self.progress.num_steps, self.progress.steps_per_epoch)
        self.objective.after_step(self.progress, self.guarded_step.applied)
        meter.step_done()
        self._count_refusal(self.applied.push(self.guarded_step.applied), step - 1)
        if self._is_logged():
            self._count_refusal(self.applied.read(), step)
        self._fetch_ahead(batches, meter)
        self._ask_for_end()
        return self._agree()

    def _ask_for_end(self) -> None:
        """Whether the objective is done. Being asked to stop meanwhile is agreed on with all else that ends a step."""
        try:
            self.has_ended = self.objective.has_ended(self.progress)
        except Stopped:
            self.stopped_waiting = True

    def _fetch_first(self, batches, meter: Meter) -> None:
        self._begin_to_fetch(self.progress.step + 1)
        for _ in range(self.accumulation):
            self._fetch_ahead(batches, meter)

    def _begin_to_fetch(self, step: int) -> None:
        """From here on what is fetched is this step's, with which the checkpoint before it goes on."""
        self.fetching_for, self.data_position = step, self.loader.state_dict()
        self.ahead: deque[Batch] = deque()
        self.no_data, self.stopped_waiting = "", False

    def _fetch_ahead(self, batches, meter: Meter) -> None:
        """One more batch of that step, or why there is none."""
        if self.fetching_for > self.progress.num_steps:
            return
        attendance.reach("waiting for data", self.fetching_for)
        if self.no_data or self.stopped_waiting:
            return
        try:
            with meter.waiting_for_data():
                self.ahead.append(next(batches))
        except Stopped:
            self.stopped_waiting = True
        except RunStopped as error:
            self.no_data = str(error)

    def _count_refusal(self, applied: float | None, step: int) -> None:
        """Raises RunStopped, on all ranks alike, where too many steps in a row were refused."""
        if applied is None:
            return
        self.nonfinite_in_a_row = 0 if applied else self.nonfinite_in_a_row + 1
        self.skipped_steps += not applied
        if self.nonfinite_in_a_row >= self.config.train.max_nonfinite_steps:
            raise RunStopped(
                f"The loss or its gradient was not finite (steps in a row: {self.nonfinite_in_a_row}), the last being "
                f"step {step}; the last good checkpoint is {self._last_checkpoint()}. "
                "Lower optimizer.lr, or write train.precision=fp32."
            )

    def _agree(self) -> "_Agreed":
        """One small message a step between the hosts: whether any rank was asked to stop, has no data, reads bad
        samples, or has written the checkpoint.

        Raises RunStopped, on all ranks alike.
        """
        stop = self._asked_to_stop() or self.stopped_waiting
        attendance.reach("ending the step", self.progress.step)
        bad, read = self.loader.bad.num_bad, self.loader.bad.num_read
        stops, bad, read, refused, without_data, saved = distributed.total(
            stop, bad, read, bool(self.stop_reason), bool(self.no_data), self.store.has_ended()
        )
        if refused:
            raise RunStopped(distributed.from_main(self.stop_reason))
        if not without_data:
            share, few = self.config.data.max_bad_share, self.config.train.global_batch
            refuse_many(bad, read, share, few, self.run_dir / "bad_samples.jsonl")
        no_data = next(filter(None, distributed.of_all(self.no_data))) if without_data else ""
        return _Agreed(bool(stops), int(bad), no_data, bool(saved))

    def _asked_to_stop(self) -> bool:
        """What this rank says of a stop where all ranks agree. The file is one rank's to see."""
        return self.stop_wanted() if distributed.is_main() else stopping.requested()

    def stop_wanted(self) -> bool:
        """Whether this rank has been asked to stop. Cheap, for whoever waits to ask often."""
        return stopping.requested() or os.path.exists(self.stop_file)

    def _is_finished(self) -> bool:
        return self.has_ended or self.progress.step == self.progress.num_steps

    # ---- watching

    def _watch(self, agreed: "_Agreed", meter: Meter) -> None:
        step = self.progress.step
        logged = self._is_logged() or agreed.stop or bool(agreed.no_data)
        loss, memory = self._measured() if logged else (0.0, 0)
        self.peak_memory = max(self.peak_memory, memory)
        if not self.monitors:
            return
        if logged:
            reading = meter.read()
            record = StepRecord(
                step=step,
                num_steps=self.progress.num_steps,
                epoch=self.progress.epoch,
                loss=loss,
                parts=on_host(self.parts),
                lr=self.lr,
                weight_decay=self.weight_decay,
                grad_norm=self.guarded_step.norm.item(),
                images_per_second=reading.images_per_second,
                data_wait=reading.data_wait,
                eta_seconds=(self.progress.num_steps - step) * meter.seconds_per_step(),
                skipped_steps=self.skipped_steps,
                bad_samples=agreed.bad_samples,
                peak_memory=self.peak_memory,
                step_seconds=reading.step_seconds,
                mfu=self.utilisation.at(reading.images_per_second),
            )
            for monitor in self.monitors:
                monitor.record(record)
        every = self.config.log.pictures_every_steps
        if every and (step % every == 0 or self._is_finished()) and self.config.train.zero_stage < 3:
            with torch.no_grad():
                pictures = self.objective.pictures(self.last_batch.head(8))
            for monitor in self.monitors:
                monitor.pictures(step, pictures)
        self._hand_over_encoder()
        self._pass_on_reports()

    def _is_logged(self) -> bool:
        return self.progress.step % self.config.log.every_steps == 0 or self._is_finished()

    def _measured(self) -> tuple[float, int]:
        """(mean loss, peak memory of the rank with most), over ranks. Collective; waits for the device."""
        memory = [0] * distributed.world_size()  # a sum with one entry a rank also has their maximum
        memory[distributed.rank()] = peak_memory()
        loss_sum, *memory = distributed.total(self.loss.item(), *memory)
        return loss_sum / distributed.world_size(), int(max(memory))

    def _hand_over_encoder(self) -> None:
        """Copies of the exported encoder's weights, to those who ask: whatever becomes of them, training goes on."""
        takers = [monitor for monitor in self.monitors if monitor.wants_encoder(self.progress)]
        for monitor in takers:
            weights = self.objective.exported_encoder().state_dict()
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
            monitor.encoder(self.progress.step, copies)

    def _pass_on_reports(self) -> None:
        for finder in self.monitors:
            self._tell(finder.found())

    def _tell(self, reports: Iterable[Report]) -> None:
        for report in reports:
            for monitor in self.monitors:
                monitor.report(report)
            if report.stop:
                self.stop_reason = report.text

    # ---- saving and resuming

    def _save(self) -> None:
        self._finish_save()
        attendance.reach("copying the state for a checkpoint", self.progress.step)
        meta = {
            "step": self.progress.step,
            "num_steps": self.progress.num_steps,
            "config": self.config.model_dump(mode="json"),
            "encoder": self.config.encoder.model_dump(mode="json"),
            "exported": self._exported_prefix(),
            "precision": self.precision.name,
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
            "loader": self.data_position,
            "own_code": self.own_code,
        } | ({"ended": True} if self.has_ended else {})  # before its last step, and for whoever asks later
        for monitor in self.monitors:
            monitor.saving(self.progress.step)
        self.store.save(self.progress.step, self.deepspeed, meta)

    def _finish_save(self) -> None:
        """Waits for the checkpoint under way, if any. Raises RunStopped, on all ranks alike, where it failed."""
        attendance.reach("saving the checkpoint", self.progress.step)
        if path := self.store.finish():
            attendance.saved(str(path))

    def _resume(self) -> list[str]:
        """Goes on from the checkpoint that was found, if any. Returns what a person should know about it."""
        path = self.goes_on_from
        if path is None:
            return []
        attendance.reach("loading a checkpoint")
        options = type(self.objective.options)
        meta = self.store.load(path, self.deepspeed, lambda meta: accept(meta, path, self.config, options, self.loader))
        self.progress, notices = progress_after(meta, self.config, self.progress, path)
        if is_own(path, self.config):  # what is logged is by steps of that batch
            for monitor in self.monitors:
                monitor.recount(meta["step"], meta["config"]["train"]["global_batch"], self.config.train.global_batch)
        changes = named_code.changes(meta.get("own_code", {}), self.own_code)
        return [*notices, *filter(None, [self.notice]), *changes]

    def _exported_prefix(self) -> str:
        exported = self.objective.exported_encoder()
        return next(name for name, module in self.objective.named_modules() if module is exported) + "."

    def _last_checkpoint(self) -> str:
        self.store.wait()
        try:
            return str(self.store.newest() or "none: no checkpoint had been written")
        except UserError as error:
            return f"none: {error}"

    # ---- starting

    def _refuse_other_ranks(self) -> None:
        facts = {"config": self.config.model_dump(mode="json"), "code": describe_code() | self.own_code}
        facts |= {"data": self.loader.state_dict(), "num_steps": self.progress.num_steps}
        refuse_differences(facts)


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know after a step."""

    stop: bool
    bad_samples: int
    no_data: str  # why some rank has no batch for the next step
    saved: bool  # whether the checkpoint under way has been written, or could not be
