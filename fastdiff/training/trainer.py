"""One training loop for every task: on accelerate, with exact resume, atomic checkpoints and a clean end."""

import contextlib
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from fastdiff.data.stream import share
from fastdiff.errors import TrainingError
from fastdiff.training import checkpoint as checkpoints
from fastdiff.training.ahead import Ahead, pays
from fastdiff.training.choices import choices_of, with_choices
from fastdiff.training.config import TrainingConfig
from fastdiff.training.ema import Ema
from fastdiff.training.provenance import check_data, records_of
from fastdiff.training.randomness import derive_seed
from fastdiff.training.run_folder import MetricsLog, RunFolder
from fastdiff.training.schedule import learning_rate, rate_jump
from fastdiff.training.setup import (
    forget_accelerator,
    keep_freed_memory,
    make_accelerator,
    on_cpu,
    parameter_groups,
    stop_on_signals,
)
from fastdiff.training.task import Batch, Task, to_device
from fastdiff.training.trackers import Trackers, check_trackers
from fastdiff.training.update import WeightUpdate
from fastdiff.tuning import using

_GLOBAL_RNG = 1  # purpose of the seed given to torch's own generator at each step


def _going_by_choices(method):
    """A method of a trainer within which choices are those of its run (`fastdiff.tuning.using`)."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with using(self.choices):
            return method(self, *args, **kwargs)

    return run


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        finished: whether max_steps were reached; False after a signal or `stop_at`.
        checkpoint: the newest checkpoint.
        samples_per_second: over the steps of this process's life, checkpoints and pictures left out.
        interrupted: whether a signal ended it.
    """

    steps: int
    finished: bool
    checkpoint: Path
    samples_per_second: float
    interrupted: bool = False


class Trainer:
    """Trains a task's model.

    Args:
        task: the model, its data and its loss.
        config: how to train.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError, ModuleNotFoundError: the run cannot start or
            resume as asked; one line; nothing was trained.
    """

    def __init__(self, task: Task, config: TrainingConfig):
        check_trackers(config)
        self.task, self.config = task, config
        self.folder = RunFolder(config.output_dir)
        forget_accelerator()
        if on_cpu(config):
            keep_freed_memory()
        self.choices = choices_of(task, config, self.folder)
        self.accelerator = make_accelerator(config, self.choices, task.partial_gradients)
        processes, parts = self.accelerator.num_processes, config.accumulation_steps
        if config.batch_size < processes * parts:
            raise ValueError(
                f"training.batch_size: got {config.batch_size}; expected at least processes x "
                f"accumulation_steps = {processes} x {parts}"
            )
        self.names = {parameter: name for name, parameter in task.model.named_parameters()}
        task.model.to(self.accelerator.device).train()
        optimizer = torch.optim.AdamW(
            parameter_groups(task.model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.ema = Ema(task.model, config.ema_decay)
        self._batches = Ahead(self._batches_of, False)  # `train` prepares them ahead where that pays
        self._end_step = 0  # of `train`
        # The last thing that a bad argument can stop: with `overwrite` it deletes the run that is there.
        self._on_main(self._prepare)
        self.steps_done = self._restore(optimizer) if config.resume else 0
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self._update = WeightUpdate(self.accelerator, self.model, self.optimizer, self.ema, config.max_grad_norm)
        self._log = MetricsLog(self.folder.metrics, self.steps_done) if self.accelerator.is_main_process else None
        self._trackers: Trackers | None = None
        self._interrupted = False
        self._started: int | None = None  # the step that `train` began with
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # step, loss, gradient norm: not yet read

    def _on_main(self, action) -> None:
        """Runs `action` on the first process; where it fails there, the others stop too instead of waiting."""
        self._batches.settle()
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except Exception as error:  # raised again below, after the other processes know of it
                failure = error
        failed = torch.tensor([failure is not None], dtype=torch.float32, device=self.accelerator.device)
        failed = self.accelerator.reduce(failed, "sum").item()
        if failure is not None:
            raise failure
        if failed:
            raise TrainingError("the first process could not go on; its message says why")

    def _prepare(self) -> None:
        self._data = records_of(self.task.data_sets())
        recipe = with_choices(self.task.recipe(), self.choices)
        self.folder.prepare(self.config, recipe, self._check_resumed)

    def _check_resumed(self, newest: Path, planned: int) -> None:
        """Raises ValueError where the files or the data of the run to go on with changed; says what else does."""
        state = checkpoints.read_state(newest)
        checkpoints.check_files(newest, state)
        check_data(
            state, self._data, repr(str(self.folder.path)), self.config.accept_changed_data,
            "--training.accept_changed_data true",
        )  # fmt: skip
        said = rate_jump(self.config, planned, state["step"])
        if said is not None:
            print(said, file=sys.stderr)

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        newest = self.folder.latest()
        if newest is None:
            return 0
        state = checkpoints.read_state(newest)
        checkpoints.load_weights(self.task.model, newest / checkpoints.WEIGHTS)
        checkpoints.load_weights(self.ema.module, newest / checkpoints.AVERAGED)
        checkpoints.load_optimizer(optimizer, self.names, newest / checkpoints.OPTIMIZER)
        return state["step"]

    def train(self, stop_at: int | None = None, seconds: float | None = None) -> Outcome:
        """Runs up to max_steps and ends with a checkpoint and pictures.

        Where the run that it resumes has come that far already, nothing is trained and only missing pictures are made.

        Args:
            stop_at: a step to end at before max_steps, with a checkpoint but no pictures; None runs to the end.
            seconds: a time to end after in the same way, at the next step that is logged; None sets no limit.

        Raises:
            TrainingError: a loss was not finite, or the disk is full; one line that names the last whole checkpoint.
        """
        config, start = self.config, self.steps_done
        if start >= config.max_steps:
            if start == config.max_steps and self.folder.latest():
                self._pictures(replace=False)
            return self._end(0.0)
        end = config.max_steps if stop_at is None else min(stop_at, config.max_steps)
        if config.trackers:
            self._trackers = Trackers(self.accelerator, config.project, self.task.recipe())
        self._progress = tqdm(
            total=config.max_steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )
        self._started = start
        self._seconds, self._timed_steps, self._clock = 0.0, 0, time.perf_counter()
        deadline = float("inf") if seconds is None else self._clock + seconds
        self._smooth_loss, self._smoothed = 0.0, 0
        self._end_step, self._batches = end, Ahead(self._batches_of, pays(self.accelerator.device))
        stopped = False
        with self._progress, contextlib.closing(self._batches), stop_on_signals() as signals:
            for step in range(start, end):
                self._pending.append((step, *self.train_step(step)))
                self.steps_done = step + 1
                due = any(map(self._due, (config.log_every, config.checkpoint_every, config.preview_every)))
                # several processes agree on stopping in the collective of `_flush`, so all must reach the same one
                if due or (signals.received and self.accelerator.num_processes == 1):
                    stopped = self._flush(signals.received or time.perf_counter() > deadline)
                if stopped or self._due(config.checkpoint_every):
                    self._save()
                if stopped:
                    # of another process's signal there is no knowing, but without a time limit nothing else stops one
                    self._interrupted = signals.received or seconds is None
                    break
                if config.preview_every and step + 1 < config.max_steps and self._due(config.preview_every):
                    self._pictures()
            if self._pending:
                self._flush(False)
            if not stopped:
                self._save()
            if self.steps_done == config.max_steps:
                self._pictures()
        return self._end(self._timed_steps * config.batch_size / self._seconds if self._seconds else 0.0)

    def _end(self, rate: float) -> Outcome:
        """Closes what is open, together with the other processes."""
        if self._log is not None:
            self._log.close()
            self.folder.unlock()
        if self._trackers is not None:
            self._trackers.finish()
        # A barrier sends no tensors. Without it gloo's thread may still hold the last one when its process group is
        # freed, and then each waits for the other: the thread for Python's lock, the main thread for the thread.
        self.accelerator.wait_for_everyone()
        # For the same reason the wrapper that holds the process group goes before the group does.
        self.model = self.accelerator.unwrap_model(self.model)
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return Outcome(
            self.steps_done, self.steps_done >= self.config.max_steps, self.folder.latest(), rate, self._interrupted
        )

    def _due(self, every: int) -> bool:
        return self.steps_done == self.config.max_steps or (every > 0 and self.steps_done % every == 0)

    @_going_by_choices
    def train_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: (this process's part of the loss, gradient norm), both detached."""
        accelerator, config = self.accelerator, self.config
        torch.manual_seed(derive_seed(config.seed, step, _GLOBAL_RNG, accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        with self._kept_when_data_fails():
            batches = self._batches.take(step, following=step + 1 < self._end_step)
        total = torch.tensor(sum(self.task.weight(batch) for batch in batches), dtype=torch.float64)
        total = accelerator.reduce(total.to(accelerator.device), "sum") if accelerator.num_processes > 1 else total
        # DistributedDataParallel averages gradients over processes; the loss is a sum over them, divided by `total`
        factor = accelerator.num_processes / max(total.item(), 1e-12)
        loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                part = self.task.loss(self.model, to_device(batch, accelerator.device)) * factor
                accelerator.backward(part)
            loss += part.detach() / accelerator.num_processes
        return loss, self._update(step)

    @contextlib.contextmanager
    def _kept_when_data_fails(self):
        """Makes a checkpoint of the steps done before an error of the data ends the run: a file that has gone, say.

        Not with several processes: the others wait in a step that will not be.
        """
        try:
            yield
        except Exception:
            if self._started is not None and self.accelerator.num_processes == 1 and self.steps_done > self._started:
                if self._pending:
                    self._flush(False)
                self._save()
                tqdm.write(f"stopped after step {self.steps_done}; {self._last_whole()}", file=sys.stderr)
            raise

    def _batches_of(self, step: int) -> list[Batch]:
        return [self.task.batch(step, slots) for slots in self._slots()]

    def _slots(self) -> list[range]:
        """This process's slots of the global batch, one range an accumulation step."""
        accelerator, parts = self.accelerator, self.config.accumulation_steps
        everyone = range(self.config.batch_size)
        mine = everyone[share(len(everyone), accelerator.num_processes, accelerator.process_index)]
        return [mine[share(len(mine), parts, part)] for part in range(parts)]

    def _flush(self, stop: bool) -> bool:
        """Reads the losses since the last flush, checks and logs them; True where any is to stop."""
        steps = [step for step, _, _ in self._pending]
        losses = torch.stack([loss for _, loss, _ in self._pending] + [self._pending[-1][1].new_tensor(float(stop))])
        norms = torch.stack([norm for _, _, norm in self._pending]).tolist()
        self._pending.clear()
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, "sum")
        *losses, stop = losses.tolist()
        elapsed = time.perf_counter() - self._clock
        self._seconds, self._timed_steps = self._seconds + elapsed, self._timed_steps + len(steps)
        rate = len(steps) * self.config.batch_size / elapsed
        lines = [
            {
                "step": step + 1,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": learning_rate(self.config, step),
                f"{self.task.unit}_per_second": round(rate, 2),
            }
            for step, loss, norm in zip(steps, losses, norms, strict=True)
        ]
        for line in lines:
            self._check_finite(line)
        self._report(lines, rate)
        self._clock = time.perf_counter()
        return stop > 0

    def _check_finite(self, line: dict) -> None:
        for name in ("loss", "gradient_norm"):
            if not abs(line[name]) < float("inf"):
                step = line["step"]
                self._batches.settle()
                raise TrainingError(
                    f"step {step}: {name.replace('_', ' ')} is {line[name]}; sample ids of the batch: "
                    f"{self.task.sample_ids(step - 1)}; {self._last_whole()}"
                )

    def _report(self, lines: list[dict], rate: float) -> None:
        for line in lines:
            # over 50 steps, and over few at first: the loss of the first steps says nothing about the present one
            weight = max(0.02, 4 / (4 + self._smoothed))
            self._smooth_loss += weight * (line["loss"] - self._smooth_loss)
            self._smoothed += 1
        self._progress.update(len(lines))
        self._progress.set_postfix_str(f"loss {self._smooth_loss:.4f}, {rate:.0f} {self.task.unit}/s")
        if self._trackers is not None:
            for line in lines:
                self._trackers.log({k: v for k, v in line.items() if k != "step"}, line["step"])
        if self._log is not None:
            with self._writing(f"the metrics of step {lines[-1]['step']}"):
                self._log.append(lines)

    def _save(self) -> None:
        self._on_main(self._write_checkpoint)
        self._clock = time.perf_counter()

    @_going_by_choices
    def _write_checkpoint(self) -> None:
        model = self.accelerator.unwrap_model(self.model)

        def write(folder: Path) -> None:
            self.task.save(model, folder)
            checkpoints.save_weights(self.ema.module, folder / checkpoints.AVERAGED)
            if hasattr(self.task, "save_averaged"):
                self.task.save_averaged(self.ema.module, folder)
            checkpoints.save_optimizer(self.optimizer, self.names, folder / checkpoints.OPTIMIZER)

        state = {
            "seed": self.config.seed,
            "processes": self.accelerator.num_processes,
            "torch": torch.__version__,
            "task": self.task.facts(),
            "data": self._data,
        }
        with self._writing(f"the checkpoint of step {self.steps_done}"):
            self._log.flush_to_disk()
            checkpoints.write_checkpoint(self.folder.checkpoints, self.steps_done, state, write, self.config.keep_last)

    @contextlib.contextmanager
    def _writing(self, what: str):
        try:
            yield
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise TrainingError(
                f"{what} could not be written to {self.folder.path} ({reason}); {self._last_whole()}"
            ) from None

    def _last_whole(self) -> str:
        newest = self.folder.latest()
        return f"last whole checkpoint: {newest}" if newest else "there is no checkpoint yet"

    def _validate(self) -> None:
        measures = self.task.validate(self.ema.module)
        if measures:
            log = MetricsLog(self.folder.validation, self.steps_done - 1)
            log.append([{"step": self.steps_done, **measures}])
            log.close()
            if self._trackers is not None:
                values = {f"validation_{name}": value for name, value in measures.items()}
                self._trackers.log(values, self.steps_done)
            text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measures.items())
            tqdm.write(f"step {self.steps_done}: {text}", file=sys.stderr)

    @_going_by_choices
    def _pictures(self, replace: bool = True) -> None:
        """Validation, loss.png, samples.png, by the first process; with `replace` False only where one is missing."""
        from fastdiff.visualization import save_loss_curve

        def draw() -> None:
            if not replace and self.folder.loss_picture.exists() and self.folder.samples_picture.exists():
                return
            with self._writing("pictures"):
                self._validate()
                save_loss_curve(self.folder.metrics, self.folder.loss_picture, validation=self.folder.validation)
                self.task.preview(self.ema.module, self.folder.samples_picture)

        self._on_main(draw)
        self._clock = time.perf_counter()
