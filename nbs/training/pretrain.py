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
# # Pretraining
# > From a run to an encoder on disk: restartable, under a lock, with a record of what made it.
#
# At the end you can pretrain any run, interrupt and continue it, and load its encoder.

# %%
#| default_exp training.pretrain

# %%
#| export
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import filelock
import pandas as pd
import torch
from matplotlib.figure import Figure

from physrep.core.files import atomic_path, read_json, write_json
from physrep.core.provenance import provenance
from physrep.data.batches import Batches
from physrep.data.scaling import Normaliser
from physrep.data.views import ViewBatches
from physrep.data.windows import Windows
from physrep.models.pretrained import save_encoder
from physrep.training.loop import Recipe, load_checkpoint, make_optimizer, read_metrics, train
from physrep.training.run import Run, build, label_scaler, load_splits
from physrep.training.watch import Watch, evaluate_objective


# %% [markdown]
# ## Pretraining
#
# A run folder holds `config.json`, `provenance.json`, `metrics.csv`, `curve.csv` with the encoders of the learning curve in `curve/`, `checkpoint/` and, when it is
# finished, `encoder.safetensors`. A finished run of the same code and data is returned as it is. A folder with another configuration is an error. A run whose code or data have changed since is trained anew, and says so.

# %%
#| export
def claim(folder: Path, config: dict, record: dict, resume: bool, say: Callable[[str], None]) -> bool:
    """Prepares a run folder; True if it holds the finished run already. An encoder of other code or data is put aside.
    Raises ValueError if the folder holds another configuration."""
    if (folder / "config.json").is_file():
        _check_same(folder, read_json(folder / "config.json"), config)
    old = read_json(folder / "provenance.json") if (folder / "provenance.json").is_file() else {}
    stale = [k for k in ("code", "data") if old and old.get(k) != record[k]]
    if resume and not stale and (folder / "encoder.safetensors").is_file():
        say(f"{folder.parent.name}/{folder.name} is finished")
        return True
    if old and (stale or not resume):
        why = f"its {' and '.join(stale)} changed" if stale else "resume is off"
        say(f"training {folder.parent.name}/{folder.name} anew: {why}")
        for name in ("encoder.safetensors", "metrics.csv", "curve.csv"):
            if (folder / name).is_file():  # an encoder may have cost days: the one before stays
                (folder / name).replace(folder / f"old-{name}")
        (folder / "checkpoint" / "last.safetensors").unlink(missing_ok=True)
        old = {}
    write_json(folder / "config.json", config)
    write_json(folder / "provenance.json", {**record, "seconds": old.get("seconds", 0.0)})
    return False


def _check_same(folder: Path, found: dict, config: dict) -> None:
    "ValueError, with the differences, if a folder holds another configuration."
    different = sorted(k for k in config.keys() | found.keys() if found.get(k) != config.get(k))
    if different:
        text = "; ".join(f"{k}: there {found.get(k)!r}, asked for {config.get(k)!r}" for k in different)
        raise ValueError(f"{folder} holds another run ({text}); name another run_dir or tag")


# %% [markdown]
# How a call trains is one small object, so that it is handed down whole. It decides no number.

# %%
#| export
@dataclass(frozen=True)
class Session:
    "Where and for how long a call trains."

    device: str = "cpu"
    resume: bool = True  # go on from a checkpoint, keep a finished run
    minutes: float = math.inf  # raise TimeUp after this time; the same call goes on
    progress: bool = True
    on_metrics: Callable[[dict], None] | None = None  # gets every row of the metrics as it is made


# %%
#| export
def training_windows(run: Run, data_dir: str | Path) -> dict[str, Windows]:
    "The windows that a run is trained on and evaluated with: `train` and `valid`."
    return load_splits(run, data_dir, ("train", "valid"), frames=run.window_frames, stride=run.clip.stride)


def training_batches(run: Run, windows: Mapping[str, Windows], device: str = "cpu") -> dict[str, Batches]:
    """Batches of `train` (symmetries and noise as the run has them) and of `valid` (plain), with the views that the
    objective asks for. ValueError for trajectories without room for them."""
    options = dict(
        normaliser=Normaliser.load(windows["train"].root, run.system),
        scaler=label_scaler(run, windows["train"]),
        size=run.clip.size,
        device=device,
        seed=run.seed,
    )
    size = run.recipe.batch_size if run.recipe else 1
    parts = run.recipe.accumulate if run.recipe else 1
    changed = dict(augment=run.clip.augment, noise=run.clip.noise)
    make = partial(ViewBatches, views=run.views) if run.views else Batches
    return {
        "train": make(windows["train"], batch_size=size, accumulate=parts, **changed, **options),
        "valid": make(windows["valid"], batch_size=size // parts, **options),
    }


# %%
#| export
def pretrain(
    run: Run,  # from `resolve`
    data_dir: str | Path,  # from `ensure_data`
    run_dir: str | Path | None = None,
    *,
    windows: Mapping[str, Windows] | None = None,  # `training_windows`, for several runs on the same data
    checkpoint_seconds: float | None = None,  # default: the recipe's
    say: Callable[[str], None] = print,
    **session,  # of `Session`: device, resume, minutes, progress, on_metrics
) -> Path:
    """Trains the encoder of a run and returns its folder. Of two processes that want the same run, the second waits and
    finds it finished. Raises ValueError (folder of another run, data that do not fit), TrainingDiverged, TimeUp."""
    session = Session(**session)
    if checkpoint_seconds is not None and run.recipe:
        run = replace(run, recipe=replace(run.recipe, checkpoint_seconds=checkpoint_seconds))
    folder = run.folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    windows = windows or training_windows(run, data_dir)
    data = "-".join(w.fingerprint() for w in windows.values())
    with filelock.FileLock(folder / ".lock"):
        record = provenance(*run.modules, device=session.device, entries=run.entries, data=data)
        if not claim(folder, run.as_dict(), record, session.resume, say):
            _pretrain(run, windows, folder, record, session)
    return folder


# %%
#| export
def _pretrain(run: Run, windows: Mapping[str, Windows], folder: Path, record: dict, session: Session) -> None:
    "Trains and saves the encoder of a claimed folder; the time is recorded even if it fails."
    batches = training_batches(run, windows, session.device)
    objective = build(run).to(session.device)
    record["parameters"] = sum(p.numel() for p in objective.encoder.parameters())
    before = read_json(folder / "provenance.json")["seconds"]
    started = time.monotonic()
    save = partial(_save, run, batches["train"].normaliser, float(windows["train"].files[0].dt))
    last = run.recipe.steps if run.recipe else 0
    watch = Watch(batches, folder, run.system.label_names, last=last, keep=partial(_keep, save, folder))
    try:
        fit(objective, run.recipe, batches, folder, session, watch=watch)
    finally:
        write_json(folder / "provenance.json", {**record, "seconds": round(before + time.monotonic() - started, 1)})
    save(folder / "encoder.safetensors", objective.encoder)


def _save(run: Run, normaliser: Normaliser, dt: float, path: Path, encoder: torch.nn.Module) -> None:
    "Writes an encoder of a run with all that is needed to use it."
    path.parent.mkdir(exist_ok=True)
    save_encoder(
        path,
        encoder,
        run.encoder,
        system=run.system,
        mean=normaliser.mean,
        std=normaliser.std,
        shape=run.clip_shape,
        dt=dt,
        objective=run.objective,
        preset=run.preset.name,
        seed=run.seed,
    )


def _keep(save: Callable[[Path, torch.nn.Module], None], folder: Path, encoder: torch.nn.Module, step: int) -> None:
    "Saves an encoder of the learning curve."
    save(folder / "curve" / f"{step}.safetensors", encoder)


# %% [markdown]
# The loop itself. An objective that trains nothing only reports what its encoder's features are worth.

# %%
#| export
def fit(
    objective: torch.nn.Module,
    recipe: Recipe | None,
    batches: Mapping,
    folder: Path,
    session: Session,
    *,
    watch: Watch | None = None,  # gets the encoders of the learning curve
    limit: int = 96,
) -> None:
    """Trains an objective on `batches['train']`, watched on `limit` windows of `batches['valid']`. Writes metrics,
    checkpoints and, with a `watch`, the learning curve into the folder."""
    valid = batches["valid"]
    if recipe is None:
        measures = evaluate_objective(objective.eval(), valid.evaluation(32, limit=128))
        if watch:
            watch(objective, 0)
        with atomic_path(folder / "metrics.csv") as temporary:
            pd.DataFrame([{"step": 0, **measures}]).to_csv(temporary, index=False)
        return
    train(
        objective,
        batches["train"],
        recipe,
        folder,
        evaluate=lambda: evaluate_objective(objective, valid.evaluation(limit=limit)),
        finished=watch,
        device=session.device,
        resume=session.resume,
        minutes=session.minutes,
        progress=session.progress,
        on_metrics=session.on_metrics,
    )


# %% [markdown]
# And the way back: the model of a finished run with its predictor or decoder, for pictures.

# %%
#| export
def restore(run: Run, run_dir: str | Path | None = None, device: str = "cpu") -> torch.nn.Module:
    """The objective of a finished run with its trained weights, predictor and decoder too. ValueError for a damaged
    checkpoint."""
    objective = build(run)
    if run.recipe:
        path = run.folder(run_dir) / "checkpoint" / "last.safetensors"
        load_checkpoint(path, objective, make_optimizer(objective, run.recipe))
    return objective.to(device).eval()


# %% [markdown]
# ## How it went

# %%
#| export
def plot_metrics(folders: Sequence[Path]) -> Figure:
    """Loss on training and held-out windows, std and effective rank of the features, over the updates: a line for each
    folder."""
    fig = Figure(figsize=(10, 2.8), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    positive = True
    for n, folder in enumerate(folders):
        one = pd.DataFrame(read_metrics(folder / "metrics.csv"))
        valid = one.dropna(subset=["valid_loss"])
        left.plot(one.step, one.loss, color="C0", lw=1, label=None if n else "train")
        left.plot(valid.step, valid.valid_loss, "o-", color="C1", ms=4, label=None if n else "valid")
        middle.plot(valid.step, valid.feature_std, "o-", color="C1", ms=4)
        right.plot(valid.step, valid.effective_rank, "o-", color="C1", ms=4)
        positive = positive and (one.loss > 0).all()
    left.set(xlabel="update", ylabel="loss", yscale="log" if positive else "linear")
    left.legend()
    middle.set(xlabel="update", ylabel="feature std", ylim=(0, None))
    right.set(xlabel="update", ylabel="effective rank", ylim=(1, None))
    return fig


# %%
# %matplotlib inline
import tempfile

from physrep.training.run import ensure_data, resolve

run = resolve("shear_flow", "mae", preset="smoke")
folder = Path(tempfile.mkdtemp())
data_dir = ensure_data(run, folder / "data", workers=1, progress=False)
done = pretrain(run, data_dir, folder / "runs", progress=False)
sorted(str(p.relative_to(done)) for p in done.rglob("*") if p.is_file() and p.name != ".lock")

# %%
plot_metrics([done])

# %%
pd.read_csv(done / "metrics.csv")[["step", "lr", "loss", "valid_loss", "feature_std", "effective_rank"]]

# %% [markdown]
# Asked again, it is there. Another configuration in the same folder is refused.

# %%
pretrain(run, data_dir, folder / "runs", progress=False)
write_json(done / "config.json", {**run.as_dict(), "tag": "other"})
try:
    pretrain(run, data_dir, folder / "runs", progress=False)
    raise AssertionError("a foreign folder was reused")
except ValueError as error:
    print(str(error).split("seed0 ")[-1])
