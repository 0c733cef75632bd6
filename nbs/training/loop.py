# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The training loop
# > One loop for every objective: precision, accumulation, clipping, a learning rate that can be brought to its end at any point, checkpoints, and a resume that is the same run.
#
# At the end you can train any objective, kill it at any moment, and get the same encoder as if nothing had happened.

# %%
#| default_exp training.loop

# %%
#| export
import copy
import csv
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from physrep.core.files import atomic_path


# %% [markdown]
# ## Learning rate
#
# The learning rate rises linearly, stays where it is, and falls linearly to zero over the last part of the run: warm-up, constant, decay.
# All is counted in *updates*: with accumulation an update is several micro-batches.
#
# Of such a run a shorter one is a part. Take the weights before the end, let the learning rate fall from there, and the result is what a run of that
# length would have given, up to the length of the warm-up. So one run gives a *learning curve of finished encoders*: it branches off at a few points.
# A cosine has no such branches, since its learning rate depends on the end from the start; the paper's presets keep it.

# %%
#| export
def warmup_cosine(
    step: int,  # from 0
    *,
    rise: int,  # updates of the linear warm-up
    end: int,  # update at which the floor is reached
    floor: float = 0.0,
) -> float:
    """Share of the peak learning rate at update `step`: linear over `rise` updates, then a cosine to `floor` at update
    `end`."""
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, end - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_constant_decay(
    step: int,  # from 0
    *,
    rise: int,  # updates of the linear warm-up
    end: int,  # updates after which it is over
    decay: int,  # updates of the linear fall at the end
) -> float:
    "Share of the peak learning rate at update `step`: linear over `rise` updates, constant, linear to 0 at `end`."
    return min(1.0, (step + 1) / rise, max(0, end - step) / decay)


# %% [markdown]
# ## The recipe

# %%
#| export
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, its learning rate, batches, counted in updates. Defaults are the paper's where it gives them.

    Raises ValueError for values that cannot be trained with. `evaluations` and `checkpoint_seconds` decide no number of
    the encoder: `decisive` leaves them out."""

    steps: int  # updates
    lr: float  # peak learning rate
    batch_size: int = 16  # windows an update
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.1  # share of the updates
    schedule: str = "constant"  # after the warm-up, with a linear decay at the end; or "cosine"
    decay: float = 0.2  # share of the updates, of the decay at the end of a constant schedule
    clip_norm: float = 1.0  # largest norm of the gradient
    accumulate: int = 1  # micro-batches an update
    precision: str = "float32"  # or "bfloat16": autocast; losses that need statistics take them in float32
    evaluations: int = 10  # on held-out windows
    checkpoint_seconds: float = 30.0  # wall time between checkpoints

    def __post_init__(self):
        if self.steps < 1 or not self.lr > 0 or self.accumulate < 1 or not self.clip_norm > 0:
            raise ValueError(f"steps, lr, accumulate and clip_norm must be positive, got {self}")
        if self.batch_size < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a positive multiple of accumulate={self.accumulate}, got {self.batch_size}"
            )
        if not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise ValueError(
                f"warmup must be a share in [0, 1) and weight_decay not negative, "
                f"got {self.warmup} and {self.weight_decay}"
            )
        if self.schedule not in SCHEDULES or not 0 < self.decay <= 1:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)} and decay a share in (0, 1], "
                f"got {self.schedule!r} and {self.decay}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"unknown precision {self.precision!r}; valid: float32, bfloat16")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON and YAML know only lists

    def decisive(self) -> dict:
        "The fields that decide numbers, by name."
        watching = ("evaluations", "checkpoint_seconds")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in watching}


# %%
#| export
CURVE = (1 / 64, 1 / 16, 1 / 4)  # shares of a run at which encoders are finished, besides its end


def learning_rate(step: int, recipe: Recipe, end: int | None = None) -> float:
    """Learning rate of update `step` (from 0). `end`: updates after which the encoder is to be finished; default: all.

    The warm-up is that of the whole run. ValueError for an earlier end of a cosine."""
    end = recipe.steps if end is None else end
    rise = max(1, round(recipe.warmup * recipe.steps))
    if recipe.schedule == "constant":
        decay = decay_steps(recipe, end)
        return recipe.lr * warmup_constant_decay(step, rise=rise, end=end, decay=decay)
    if end != recipe.steps:
        raise ValueError(f"a cosine over {recipe.steps} updates cannot end at {end}: use schedule 'constant'")
    return recipe.lr * warmup_cosine(step, rise=rise, end=recipe.steps - 1, floor=0.01)


def decay_steps(recipe: Recipe, end: int) -> int:
    "Updates over which the learning rate falls before `end`."
    return max(1, round(recipe.decay * end))


def branches(recipe: Recipe) -> dict[int, int]:
    "Updates after which an encoder is finished before the end of a run -> update at which it branches off the run."
    if recipe.schedule != "constant":
        return {}
    points = {round(share * recipe.steps) for share in CURVE}
    return {end: end - decay_steps(recipe, end) for end in sorted(points) if 0 < end < recipe.steps}


# %%
import matplotlib.pyplot as plt

shown = Recipe(steps=640, lr=1e-3, warmup=0.02)
fig, ax = plt.subplots(figsize=(5, 2.2), layout="constrained")
ax.plot([learning_rate(k, shown) for k in range(640)], label="the run")
for end, start in branches(shown).items():
    ax.plot(range(start, end), [learning_rate(k, shown, end) for k in range(start, end)], "C1", lw=2)
ax.plot([], [], "C1", label="branches that finish an encoder")
ax.set(xlabel="update", ylabel="learning rate")
ax.legend();

# %%
rates = [learning_rate(k, shown) for k in range(640)]
assert max(rates) == 1e-3 and rates.index(1e-3) == 12 and rates[511] == 1e-3 and abs(rates[-1] - 1e-3 / 128) < 1e-12
assert branches(shown) == {10: 8, 40: 32, 160: 128}
# with the same warm-up in updates, a branch is the end of a run of that length
shorter = Recipe(steps=160, lr=1e-3, warmup=0.02 * 4)
assert [learning_rate(k, shorter) for k in range(160)] == [learning_rate(k, shown, 160) for k in range(160)]
assert branches(Recipe(steps=640, lr=1e-3, schedule="cosine")) == {}

# %% [markdown]
# ## The optimiser
#
# AdamW; vectors (biases, norms, scales, tokens) are not decayed.


# %%
#| export
def make_optimizer(objective: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    "AdamW over the parameters that need gradients; those of one dimension, and single tokens, without weight decay."
    parameters = [p for p in objective.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.squeeze().ndim > 1]
    others = [p for p in parameters if p.squeeze().ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, fused=True)


# %% [markdown]
# ## Checkpoints
#
# A checkpoint is one safetensors file: parameters, the two moments of each, and the step in its metadata. Tensors and JSON: nothing in it is executed on
# loading. It is written to a temporary name and renamed, so whoever is killed during a save keeps the one before.

# %%
#| export
def save_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    "Writes parameters, buffers and optimiser state after `step` updates, whole or not at all."
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in objective.state_dict().items()}
    for name, p in objective.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"step": json.dumps(step)})


def load_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores objective and optimiser in place and returns the number of updates done. Raises ValueError that names a
    file that does not fit."""
    try:
        with safe_open(path, "pt") as f:
            step = json.loads(f.metadata()["step"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        objective.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of this run ({error}); delete it to start again") from error
    for name, p in objective.named_parameters():
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{k}.{name}" in tensors]
        if keys:
            optimizer.state[p] = {k: tensors[f"optimizer.{k}.{name}"].to(p.device) for k in keys}
    return step


# %% [markdown]
# ## One update
#
# A loss that is not a number stops the run, with the step, the learning rate and the samples of the batch. It stops *before* the weights are
# touched or saved, so the last checkpoint is good.

# %%
#| export
class TrainingDiverged(RuntimeError):
    "The loss, its gradient or the weights are not finite."


def update(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[dict],
    recipe: Recipe,
    *,
    step: int,
    device: torch.device,
    end: int | None = None,  # as in `learning_rate`
) -> dict[str, float]:
    """One update: accumulate the gradients of the micro-batches, clip, step. Returns loss, its parts and the gradient
    norm."""
    lr = learning_rate(step, recipe, end)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    for batch in micro_batches:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            parts = objective(batch)
        (parts["loss"] / recipe.accumulate).backward()
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach()) / recipe.accumulate
        if not math.isfinite(sums["loss"]):
            raise TrainingDiverged(_diverged("loss", sums["loss"], step, lr, batch))
    norm = float(nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip_norm))
    if not math.isfinite(norm):
        raise TrainingDiverged(_diverged("gradient norm", norm, step, lr, batch))
    optimizer.step()
    size = float(
        torch.stack(torch._foreach_norm([p.detach() for p in objective.parameters() if p.requires_grad])).sum()
    )
    if not math.isfinite(size):  # a step that was far too long: found here, it is never saved
        raise TrainingDiverged(_diverged("norm of the weights", size, step, lr, batch))
    if hasattr(objective, "after_step"):  # e.g. the moving average of a target encoder
        objective.after_step(step + 1, recipe.steps)
    return {"lr": lr, **sums, "grad_norm": norm}


# %%
#| export
def _diverged(what: str, value: float, step: int, lr: float, batch: dict) -> str:
    largest = float(batch["fields"].abs().max())
    return (
        f"the {what} is {value} at step {step} (learning rate {lr:.3g}); batch of {len(batch['seeds'])} with seeds "
        f"{batch['seeds'].tolist()}, largest input {largest:.3g}. The last checkpoint is kept; lower lr or clip_norm"
    )


# %% [markdown]
# ## The loop
#
# `metrics.csv` has a row for every `log_every`-th update and for every evaluation, and no clock readings: two runs that are the same have the same file. On resume its rows
# behind the checkpoint are dropped.

# %%
#| export
class TimeUp(RuntimeError):
    "The time given to this call is over; the checkpoint is saved, and the same call goes on from there."


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.csv`, every number as it was written (Python's floats survive the round trip). Empty cells
    are left out."""
    with open(path, newline="", encoding="utf-8") as f:
        return [{k: int(v) if k == "step" else float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


# %%
#| export
class MetricsLog:
    """The rows of `metrics.csv`: kept in memory, handed to a listener as they are made, written whole at every
    checkpoint."""

    def __init__(self, path: Path, on_metrics: Callable[[dict[str, float]], None] | None = None):
        self.path = path
        self.on_metrics = on_metrics
        self.rows: list[dict] = []

    def restore(self, step: int) -> None:
        "The rows up to update `step` of a run that goes on."
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.is_file() else []

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self.on_metrics:
            self.on_metrics(row)

    def write(self) -> None:
        with atomic_path(self.path) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)


# %%
#| export
def evaluation_steps(recipe: Recipe) -> set[int]:
    """The updates after which held-out windows are looked at: as many as the recipe says, evenly from the first to the
    last; only the last if it says one."""
    count = min(recipe.evaluations, recipe.steps)
    if count == 1:
        return {recipe.steps}
    return {1 + round(k * (recipe.steps - 1) / (count - 1)) for k in range(count)} if count else set()


def _evaluated(objective: nn.Module, evaluate: Callable[[], dict], recipe: Recipe, device: torch.device) -> dict:
    "What `evaluate` measures, in evaluation mode and in the precision of training."
    objective.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        measures = evaluate()
    objective.train()
    return measures


# %% [markdown]
# A branch trains a copy: the run itself goes on as if it had not been. What is `finished` there is whatever the caller does with a finished encoder, such
# as probing it.

# %%
#| export
Finished = Callable[[nn.Module, int], None]  # is given an objective and the number of its updates


def finish_branch(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[dict]],
    recipe: Recipe,
    *,
    start: int,
    end: int,
    device: torch.device,
) -> nn.Module:
    "A copy of the objective after `start` updates, trained until `end` while the learning rate falls to 0."
    twin = copy.deepcopy(objective)
    own = make_optimizer(twin, recipe)
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the moments, and change them
    for step in range(start, end):
        update(twin, own, batches(step), recipe, step=step, device=device, end=end)
    return twin


def _show(finished: Finished | None, objective: nn.Module, step: int, recipe: Recipe, device: torch.device) -> None:
    "Hands an objective to `finished`, in evaluation mode and in the precision of training."
    if finished:
        _evaluated(objective, lambda: finished(objective, step), recipe, device)


# %%
#| export
def train(
    objective: nn.Module,
    batches: Callable[[int], Iterable[dict]],  # step -> its micro-batches
    recipe: Recipe,
    folder: str | Path,  # gets checkpoint/last.safetensors and metrics.csv
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,  # extra columns, at every evaluation
    finished: Finished | None = None,  # gets untrained, branched off and trained objectives, each with its updates
    on_metrics: Callable[[dict[str, float]], None] | None = None,  # called with every row of metrics as it is made
    log_every: int = 10,  # updates between rows of metrics
    minutes: float = math.inf,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Trains `objective` in place and returns the metrics. With `resume` it goes on from the checkpoint in `folder`, if
    there is one; on the CPU the result is bit for bit that of an undisturbed run.

    Raises TrainingDiverged, and TimeUp when `minutes` are over."""
    folder = Path(folder)
    device = torch.device(device)
    started = time.monotonic()
    log = MetricsLog(folder / "metrics.csv", on_metrics)
    checkpoint = folder / "checkpoint" / "last.safetensors"
    objective.to(device).train()
    optimizer = make_optimizer(objective, recipe)
    step = 0
    if resume and checkpoint.is_file():
        step = load_checkpoint(checkpoint, objective, optimizer)
        log.restore(step)
    looks = evaluation_steps(recipe)
    ends = branches(recipe) if finished else {}
    if step == 0:
        _show(finished, objective, 0, recipe, device)
    saved = time.monotonic()
    with tqdm(total=recipe.steps, initial=step, desc="train", unit="update", disable=not progress) as bar:
        while step < recipe.steps:
            for end in (end for end, start in ends.items() if start == step):
                bar.set_description(f"finish at {end}")
                twin = finish_branch(objective, optimizer, batches, recipe, start=step, end=end, device=device)
                _show(finished, twin, end, recipe, device)
                bar.set_description("train")
            parts = update(objective, optimizer, batches(step), recipe, step=step, device=device)
            step += 1
            bar.update()
            if step % log_every == 0 or step in looks:
                measures = _evaluated(objective, evaluate, recipe, device) if evaluate and step in looks else {}
                log.add({"step": step, **parts, **measures})
                bar.set_postfix(loss=f"{parts['loss']:.4g}", refresh=False)
            late = time.monotonic() - started > 60 * minutes and step < recipe.steps
            if late or step == recipe.steps or time.monotonic() - saved > recipe.checkpoint_seconds:
                log.write()
                save_checkpoint(checkpoint, objective, optimizer, step)
                saved = time.monotonic()
            if late:
                raise TimeUp(
                    f"{minutes:g} minutes are over at update {step} of {recipe.steps}; the checkpoint is saved, "
                    "run the same command again to go on"
                )
    _show(finished, objective, step, recipe, device)
    return pd.DataFrame(log.rows)


# %% [markdown]
# A toy objective: fit a matrix.

# %%
import tempfile
from dataclasses import replace


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, batch):
        loss = (self.layer(batch["fields"]) - batch["fields"].flip(-1)).square().mean()
        return {"loss": loss, "error": loss.detach()}


def toy_batches(step, micro=1):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return [{"fields": part, "seeds": torch.arange(len(part))} for part in x.chunk(micro)]


recipe = Recipe(steps=320, lr=3e-2, weight_decay=0.0)
folder = Path(tempfile.mkdtemp())
toy = Toy()
curve = {}


def keep(objective, step):
    curve[step] = {name: value.clone() for name, value in objective.state_dict().items()}


metrics = train(toy, toy_batches, recipe, folder / "whole", finished=keep, progress=False)
metrics.plot(x="step", y="loss", logy=True, figsize=(4, 2), legend=False, ylabel="loss");

# %%
assert metrics.loss.iloc[-1] < 1e-3 * metrics.loss.iloc[0]

# %% [markdown]
# On the way it has finished three encoders. The one after 80 updates is that of a run of 80 updates with the same warm-up, to the last bit.

# %%
short = Toy()
train(short, toy_batches, replace(recipe, steps=80, warmup=4 * recipe.warmup), folder / "short", progress=False)
assert all(torch.equal(value, curve[80][name]) for name, value in short.state_dict().items())
sorted(curve)

# %% [markdown]
# Interrupted (here after a tenth of a second, again and again) it is the same run, to the last bit, and so is its table.

# %%
pieces = 0
while True:
    again = Toy()  # a new process would build it anew, too
    try:
        train(again, toy_batches, recipe, folder / "pieces", minutes=0.1 / 60, progress=False)
        break
    except TimeUp:
        pieces += 1
assert all(torch.equal(a, b) for a, b in zip(toy.state_dict().values(), again.state_dict().values()))
assert (folder / "whole/metrics.csv").read_bytes() == (folder / "pieces/metrics.csv").read_bytes()
pieces > 0

# %% [markdown]
# ### Who wants to listen
#
# `on_metrics` is called with every row of the metrics as it is made. This writes them for TensorBoard, where that is installed; here a list listens.
#
#     from torch.utils.tensorboard import SummaryWriter
#
#     writer = SummaryWriter("runs/tensorboard")
#     train(..., on_metrics=lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"])

# %%
heard = []
train(
    Toy(),
    toy_batches,
    Recipe(steps=20, lr=3e-2, evaluations=2),
    folder / "heard",
    on_metrics=heard.append,
    progress=False,
)
assert [row["step"] for row in heard] == [row["step"] for row in read_metrics(folder / "heard" / "metrics.csv")]
[row["step"] for row in heard]

# %% [markdown]
# Four micro-batches of 4 give what one batch of 16 gives, as the loss is a mean over samples.

# %%
accumulated = Toy()
train(
    accumulated,
    lambda k: toy_batches(k, micro=4),
    Recipe(steps=320, lr=3e-2, weight_decay=0.0, accumulate=4),
    folder / "micro",
    progress=False,
)
assert torch.allclose(toy.layer.weight, accumulated.layer.weight, atol=1e-4)


# %% [markdown]
# A loss that is not a number is reported with what is needed to find the reason, and the checkpoint before it stays.

# %%
def broken(step):
    return [
        {k: v * float("nan") if step == 12 and k == "fields" else v for k, v in b.items()} for b in toy_batches(step)
    ]


import pytest

with pytest.raises(TrainingDiverged, match="the loss is nan at step 12 .learning rate"):
    train(Toy(), broken, replace(recipe, checkpoint_seconds=0), folder / "nan", progress=False)
survivor = Toy()
assert load_checkpoint(folder / "nan/checkpoint/last.safetensors", survivor, make_optimizer(survivor, recipe)) == 12
assert torch.isfinite(survivor.layer.weight).all()
