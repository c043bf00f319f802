"""Train the adapters of two frozen encoders on their latents."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from modest_align_train.adapters import CHUNK, Aligner, load_aligner
from modest_align_train.checkpoints import (
    BEST,
    LAST,
    PREVIOUS,
    State,
    fits_its_settings,
    has_checkpoint,
    named,
    part,
    read_checkpoint,
    write_checkpoint,
)
from modest_align_train.devices import choose_device
from modest_align_train.evaluate import embed, recalls, retrieval_ranks, validation_score
from modest_align_train.files import write_file
from modest_align_train.latents import Latents, latents_fingerprint, load_latents
from modest_align_train.rows import Rows
from modest_align_train.settings import Settings, run_settings
from modest_align_train.workers import ALONE, Workers

__all__ = ["Aligner", "load_aligner", "train"]


def train(settings: Settings, *, progress: bool = True, workers: Workers = ALONE) -> Path:
    """Train, or go on with the interrupted run in `settings.output`.

    Exact: on the CPU a run that was killed and started again gives the same losses, bit for bit, as one
    that was not. Ctrl-C finishes the step, writes the checkpoint and raises KeyboardInterrupt with a
    sentence on how to go on.

    Several workers train what one process would: each draws the whole batch, its noise and its dropout, takes its
    share of the rows through the adapters, and the loss is that of all rows. So the losses are the same but for
    rounding, and a checkpoint goes on with any number of them.

    Args:
        settings: All of it.
        progress: Print the settings, and show a progress bar.
        workers: Those that train together; each calls this, and the first one writes.

    Returns:
        The run directory, with `settings.toml`, `log.jsonl`, `tensorboard/`, `last.safetensors` (to resume from),
        `previous.safetensors` (in case that one gets damaged) and `best.safetensors` (the highest mean of R@1, R@5 and
        R@10, both ways, on the validation split).

    Raises:
        ValueError: A setting is of the wrong type, out of range, or differs from those of the run to resume; the
            latents are not those that it was trained on; another process is writing into the directory; no
            checkpoint of the run is whole.
        FileNotFoundError: There are no latents.
        FloatingPointError: The loss or a weight is no longer finite; the last good checkpoint is kept.
    """
    settings = settings.checked()
    settings = replace(settings, latents=settings.latents.resolve(), output=settings.output.resolve())
    with workers.alone_in(settings.output):
        return _train(settings, progress and workers.writes, workers)


def _train(settings: Settings, progress: bool, workers: Workers) -> Path:
    device = choose_device(workers.device or settings.device)
    settings, checkpoint, file = workers.together(lambda: _load_checkpoint(settings, device))
    workers.agree("the checkpoint", checkpoint and checkpoint["step"])
    if checkpoint and checkpoint["step"] == settings.steps:
        if progress:
            print(f"{settings.output} is finished: all its {settings.steps} steps are done")
        return settings.output
    latents = workers.together(lambda: load_latents(settings.latents))
    settings = settings.for_images(sum(record.split == "train" for record in latents.records))
    workers.agree("the latents or a setting", (latents.fingerprint, replace(settings, device="")))
    if workers.writes:
        for leftover in (path for name in (BEST, LAST) for path in settings.output.glob(f".{name}.*.tmp")):
            leftover.unlink()  # of a process that was killed
        if file == PREVIOUS:
            # The next one would be kept in its place, and a damaged one at that.
            (settings.output / PREVIOUS).replace(settings.output / LAST)
        if not checkpoint:
            write_file(settings.output / "settings.toml", settings.to_toml())
    if progress:
        print(settings.to_toml())

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        run = workers.together(lambda: Run(settings, latents, device, workers))
        if checkpoint:
            with fits_its_settings(settings.output / LAST):
                run.load_state_dict(checkpoint)
        log, tensorboard = settings.output / "log.jsonl", settings.output / "tensorboard"
        with (
            _open_log(log, run.log_bytes) if workers.writes else nullcontext() as run.log_file,
            SummaryWriter(tensorboard, purge_step=run.step + 1) if workers.writes else nullcontext() as run.board,
            tqdm(total=settings.steps, initial=run.step, desc=settings.output.name, disable=not progress) as bar,
            _ctrl_c() as interrupted,
        ):
            stop = False
            while not stop:
                run.step += 1
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(run.step, settings)
                run.losses.append(training_step(run.aligner, run.optimizer, *run.batches.draw(), settings, workers))
                last = run.step == settings.steps
                stop = workers.any(interrupted.is_set()) or last

                if last or run.step % settings.log_every == 0:
                    run.log()
                if run.validation and (last or run.step % settings.validate_every == 0):
                    run.validate()
                if stop or run.step % settings.checkpoint_every == 0:
                    run.checkpoint()
                bar.set_postfix(run.shown, refresh=False)
                bar.update()
    if not last:
        raise KeyboardInterrupt(
            f"stopped after step {run.step} of {settings.steps}: the same command goes on from there"
        )
    if progress and run.kept:
        first = ", the first that was validated" if run.kept <= settings.validate_every else ""
        print(
            f"kept step {run.kept} of {settings.steps}{first}: validation recall {run.best:.1f}% (mean of R@1, 5, 10)"
        )
    return settings.output


class Run:
    """A training run: its model, optimizer, batches, random state and place in its log.

    Args:
        settings: With absolute directories.
        latents: Of all splits.
        device: Where to train.
        workers: Those that train together.

    Attributes:
        step: Steps done.
        best: Highest validation score so far, in percent.
        kept: The step that had it.
        losses: Losses since the last line of the log, 0-dim; on the device, so that no step waits.
        shown: What a progress bar may show.
    """

    def __init__(self, settings: Settings, latents: Latents, device: torch.device, workers: Workers = ALONE) -> None:
        self.settings, self.directory, self.device, self.workers = settings, settings.output, device, workers
        self.fingerprint = latents.fingerprint
        self.batches = Batches(latents.subset("train"), settings, device, workers)
        self.validation: Latents | None = None
        if any(record.split == "validation" for record in latents.records):
            self.validation = latents.subset("validation").to(device)
        else:
            warnings.warn(
                f"{settings.latents} has no validation split: the last checkpoint is taken for the best", stacklevel=3
            )
        dims = latents.image.shape[1], latents.text.shape[1]
        self.aligner = Aligner(*dims, settings, workers.group).to(device).train()
        self.parameters = [p for p in self.aligner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            fused=True,
        )
        self.step, self.best, self.kept, self.log_bytes = 0, -1.0, 0, 0
        self.losses: list[Tensor] = []
        self.shown: dict[str, str] = {}
        self.start = time.perf_counter()

    def state_dict(self, losses: list[float]) -> State:
        """Return what `load_state_dict` needs to go on from here; `losses` are those since the log's last line."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        # Its groups are as the settings have them.
        moments = self.optimizer.state_dict()["state"]
        return {
            "step": self.step,
            "latents": self.fingerprint,
            "best": self.best,
            "kept": self.kept,
            "seconds": time.perf_counter() - self.start,
            "losses": torch.tensor(losses),
            "log_bytes": self.log_file.tell(),
            **named("model", self.aligner.state_dict()),
            **named("optimizer", {f"{i}.{name}": value for i in moments for name, value in moments[i].items()}),
            **named("batches", self.batches.state_dict()),
            **named("rng", rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a `state_dict`; the global random state too."""
        self.step, self.best, self.kept, self.log_bytes = (
            state[name] for name in ("step", "best", "kept", "log_bytes")
        )
        self.start = time.perf_counter() - state["seconds"]
        self.losses = list(state["losses"].to(self.device))
        self.aligner.load_state_dict(part(state, "model"))
        moments: dict[int, dict[str, Tensor]] = {}
        for place, value in part(state, "optimizer").items():
            parameter, _, name = place.partition(".")
            moments.setdefault(int(parameter), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.batches.load_state_dict(part(state, "batches"))
        torch.set_rng_state(state["rng.cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng.cuda"].cpu(), self.device)

    def log(self) -> None:
        """Write the mean loss since the last line, the learning rate, the scale and the seconds so far."""
        line = {
            "loss": math.fsum(self._finite_losses()) / len(self.losses),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "scale": float(self.aligner.scale),
            "seconds": time.perf_counter() - self.start,
        }
        self.losses.clear()
        self._write_line(line)
        self._plot({name: line[name] for name in ("loss", "learning_rate", "scale")})
        self.shown["loss"] = f"{line['loss']:.3f}"

    def validate(self) -> None:
        """Write recalls on the validation split, and the best checkpoint if their mean is the highest so far."""
        found = recalls(
            retrieval_ranks(*embed(self.aligner, self.validation, self.workers), self.validation, self.workers)
        )
        self._write_line({"validation": found})
        self._plot(
            {f"validation/{way}/{name}": value for way, values in found.items() for name, value in values.items()}
        )
        self.shown["R@1"] = f"{found['mean']['R@1']:.1f}"
        score = validation_score(found)
        if score > self.best:
            self.best, self.kept = score, self.step
            self._save_best()

    def checkpoint(self) -> None:
        """Write the last checkpoint, unless a loss or a weight is not finite."""
        if not all(p.isfinite().all() for p in self.parameters):
            raise FloatingPointError(self._not_finite("a weight", self.step))
        losses = self._finite_losses()
        if not self.workers.writes:
            return
        state = self.state_dict(losses)
        os.fsync(self.log_file.fileno())
        if self.step == self.settings.steps and not self.validation:
            self._save_best()
        write_checkpoint(self.directory / LAST, state, keep=self.directory / PREVIOUS)

    def _save_best(self) -> None:
        if not self.workers.writes:
            return
        state = {
            "step": self.step,
            "latents": self.fingerprint,
            "image_dim": self.aligner.image_adapter.features,
            "text_dim": self.aligner.text_adapter.features,
            **named("model", self.aligner.state_dict()),
        }
        write_checkpoint(self.directory / BEST, state)

    def _plot(self, values: dict[str, float]) -> None:
        if self.workers.writes:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.step)

    def _write_line(self, content: dict[str, Any]) -> None:
        if not self.workers.writes:
            return
        self.log_file.write(json.dumps({"step": self.step, **content}) + "\n")
        self.log_file.flush()

    def _finite_losses(self) -> list[float]:
        values = torch.stack(self.losses).tolist() if self.losses else []
        for step, value in enumerate(values, self.step - len(values) + 1):
            if not math.isfinite(value):
                raise FloatingPointError(self._not_finite("the loss", step))
        return values

    def _not_finite(self, what: str, step: int) -> str:
        kept = "its last checkpoint is kept" if (self.directory / LAST).is_file() else "it had no checkpoint yet"
        return (
            f"{what} is not finite at step {step} of {self.directory} ({kept}): try a lower learning_rate or max_scale"
        )


class Batches:
    """Training pairs, and the batches drawn from them.

    The latents stay on the training device if they take at most half of its free memory, otherwise in host
    memory, from where batches travel by asynchronous copies. `Rows` are read batch by batch, unless they fit on a GPU.

    Args:
        latents: Of the training split.
        settings: Gives `batch_size`, `shuffled_captions` and `seed`.
        device: Where batches are wanted.
        workers: Those that draw the same batches.
    """

    def __init__(self, latents: Latents, settings: Settings, device: torch.device, workers: Workers = ALONE) -> None:
        size = 4 * sum(math.prod(one.shape) for one in (latents.image, latents.text))
        # A GPU's generator draws others than the CPU's: where batches are drawn is the same for all.
        fits = all(workers.everyone(device.type == "cpu" or size <= torch.cuda.mem_get_info(device)[0] // 2))
        self.device = device
        self.home = device if fits else torch.device("cpu")
        self.generator = torch.Generator(self.home).manual_seed(settings.seed)
        self.image, self.text = (_unit_rows(one, self.home) for one in (latents.image, latents.text))
        self.images = len(self.image)
        self.batch_size = min(settings.batch_size, self.images)
        # A batch holds an image once, so without larger groups no two of its pairs are of one group.
        self.group = None if int(latents.group.max()) + 1 == self.images else latents.group.to(self.home)
        count = latents.caption_image.bincount(minlength=self.images).to(self.home)
        first = count.cumsum(0) - count
        shuffled = torch.randperm(self.images, generator=self.generator, device=self.home)
        shuffled = shuffled[: round(settings.shuffled_captions * self.images)]
        # Handed round in a circle, so that none keeps its own.
        self.count, self.first = count.clone(), first.clone()
        self.count[shuffled], self.first[shuffled] = count[shuffled.roll(1)], first[shuffled.roll(1)]
        self.order = shuffled[:0]
        self.position = 0

    def draw(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw unit-norm image latents [B, Di], text latents [B, Dt], and group ids int64 [B] or None.

        Each epoch takes the images in a new order and leaves out the last partial batch; each image comes
        with one of its captions.
        """
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(self.images, generator=self.generator, device=self.home)
            self.position = 0
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        choice = torch.randint(2**31, rows.shape, generator=self.generator, device=self.home)
        captions = self.first[rows] + choice % self.count[rows]
        group = None if self.group is None else self._send(self.group[rows])
        return self._take(self.image, rows), self._take(self.text, captions), group

    def _take(self, unit: Tensor | Rows, rows: Tensor) -> Tensor:
        return self._send(normalize(unit[rows].to("cpu"), dim=-1) if isinstance(unit, Rows) else unit[rows])

    def _send(self, batch: Tensor) -> Tensor:
        return batch if self.home == self.device else batch.pin_memory().to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        return {"order": self.order, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.order = state["order"].to(self.home)
        self.position = state["position"]
        self.generator.set_state(state["generator"].cpu())


def _unit_rows(latents: Tensor | Rows, device: torch.device) -> Tensor | Rows:
    """Normalise latents and put them on a device; for the CPU, those on disk stay there as they are."""
    if isinstance(latents, Tensor):
        return normalize(latents, dim=-1).to(device)
    if device.type == "cpu":
        return latents
    unit = torch.empty(latents.shape, device=device)
    for chunk, rows in zip(unit.split(CHUNK), latents.split(CHUNK), strict=True):
        chunk.copy_(normalize(rows.to(device), dim=-1))
    return unit


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate of a step from 1: linear warm-up, then a cosine that would be 0 after the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = (step - 1 - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def fuse(image: Tensor, text: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """FuseMix (Vouitsis et al., 2024): mix each pair with another of the batch.

    One share ~ Beta(alpha, alpha) a call, the same in both modalities. A share below 1/2 is the same as its
    complement with the roles of the two pairs changed; taking the larger one keeps row i mostly pair i, and
    so of its group.

    Args:
        image: [B, Di].
        text: [B, Dt].
        alpha: Above 0.
    """
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    share = max(share, 1 - share)
    partner = torch.randperm(len(image), device=image.device)
    return image[partner].lerp(image, share), text[partner].lerp(text, share)


def training_step(
    aligner: Aligner,
    optimizer: torch.optim.Optimizer,
    image: Tensor,
    text: Tensor,
    group: Tensor | None,
    settings: Settings,
    workers: Workers = ALONE,
) -> Tensor:
    """One optimiser step on a batch of unit-norm latents, the same for every worker; its loss, detached."""
    # For the whole batch, of which this worker then takes its share.
    if settings.fusemix_alpha:
        image, text = fuse(image, text, settings.fusemix_alpha)
    if settings.latent_noise_std:
        image = image + settings.latent_noise_std * torch.randn_like(image)
        text = text + settings.latent_noise_std * torch.randn_like(text)
    own = workers.share(len(image))
    if workers.group is not None:
        aligner.take_share(len(image), own)
    image, text, group = image[own], text[own], None if group is None else group[own]
    with torch.autocast(image.device.type, torch.bfloat16, enabled=image.device.type == "cuda"):
        loss = aligner.loss(aligner.image_adapter(image), aligner.text_adapter(text), group_ids=group)
    loss.backward()
    workers.average_gradients(aligner.parameters())
    optimizer.step()
    optimizer.zero_grad()
    if settings.learn_scale:
        with torch.no_grad():
            aligner.loss.log_scale.clamp_(max=math.log(settings.max_scale))
    return loss.detach()


def _load_checkpoint(settings: Settings, device: torch.device) -> tuple[Settings, State | None, str]:
    """Load the run's last checkpoint, if it has one, once its settings and its latents are seen to be the same.

    Returns:
        The settings, with those of the run for what was to follow the data, the checkpoint, and the name of its file.
    """
    run = settings.output
    checkpoint, file = _last_whole_checkpoint(run, device)
    if checkpoint is None:
        return settings, None, ""
    stored = run_settings(run)
    settings = replace(
        settings,
        steps=settings.steps or stored.steps,
        validate_every=settings.validate_every or stored.validate_every,
    )
    for name, now in vars(settings).items():
        before = getattr(stored, name)
        # A run directory may have been moved.
        if before != now and name != "output":
            raise ValueError(
                f"{name} is {now!s} but {before!s} in the run stored in {run}: "
                f"take the stored value to go on with it, or another output"
            )
    with fits_its_settings(run / file):
        trained_on, _ = checkpoint["latents"], checkpoint["step"]
    if trained_on != latents_fingerprint(settings.latents):
        raise ValueError(
            f"latents {settings.latents} are not those that the run stored in {run} was trained on, they were "
            "extracted again: take another --output, or delete the run"
        )
    return settings, checkpoint, file


def _last_whole_checkpoint(run: Path, device: torch.device) -> tuple[State | None, str]:
    """The last checkpoint or, if that is damaged or a kill came between two renames, the one before; and its name."""
    has_previous = (run / PREVIOUS).is_file()
    damage = ""
    if has_checkpoint(run / LAST):
        try:
            return read_checkpoint(run / LAST, device)[0], LAST
        except ValueError:
            if not has_previous:
                raise
            damage = f"{run / LAST} is damaged (its checksum differs)"
    if not has_previous:
        return None, ""
    state = read_checkpoint(run / PREVIOUS, device)[0]
    if damage:
        warnings.warn(f"{damage}: the run goes on from the checkpoint before, of step {state['step']}", stacklevel=6)
    return state, PREVIOUS


def _open_log(path: Path, size: int) -> TextIO:
    """Open the log to append after its first `size` bytes: what came after the checkpoint comes again."""
    log = path.open("a", encoding="utf-8")
    if log.tell() < size:
        raise ValueError(f"{path} is shorter than when the run's last checkpoint was written")
    log.truncate(size)
    log.seek(size)
    return log


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets; the second one stops at once, as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
