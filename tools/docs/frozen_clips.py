"""Measures what clips of another rate, grid or length cost a frozen encoder, for the guide; some seconds.

    python tools/docs/frozen_clips.py > tools/docs/frozen_clips.json

New shear flows are simulated on 64x64 points with frames 0.05 apart, finer in space and time than the clips that the
encoder of the package was trained on. From them the clips of the guide are made.
"""

import json
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import physrep
from physrep.models.pretrained import SHIPPED, LoadedEncoder
from physrep.physics.shear_flow import simulate
from physrep.physics.spectral import resize_spectrum, to_field, to_spectrum
from physrep.probing.features import Features, encoder_digest
from physrep.training.presets import get_preset

FLOWS, SEED = 48, 5000  # initial conditions that no split has
FINE = 0.05  # time between the frames that are simulated
PROBES = ("attentive", "linear")


def truncated(x: torch.Tensor, n: int) -> torch.Tensor:
    "Periodic fields `(..., h, w)` on n x n points: the waves that do not fit are left out."
    return to_field(resize_spectrum(to_spectrum(x), tuple(x.shape[-2:]), (n, n)), (n, n))


def averaged(x: torch.Tensor, n: int) -> torch.Tensor:
    "Fields `(b, c, t, h, w)` on n x n points: each is the mean of the area that it stands for."
    return F.interpolate(x.flatten(1, 2), (n, n), mode="area").unflatten(1, x.shape[1:3])


def at_rate(x: torch.Tensor, dt: float, wanted: float, frames: int) -> torch.Tensor:
    "Frames `(b, c, t, h, w)` that are `dt` apart at `frames` times that are `wanted` apart, by linear interpolation."
    place = torch.arange(frames) * wanted / dt
    before = place.long().clamp(max=x.shape[2] - 2)
    weight = (place - before).view(-1, 1, 1)
    return (1 - weight) * x[:, :, before] + weight * x[:, :, before + 1]


def held(x: torch.Tensor, frames: int) -> torch.Tensor:
    "A short clip with its last frame repeated."
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, frames - x.shape[2], -1, -1)], dim=2)


def flows(frames: int) -> tuple[torch.Tensor, np.ndarray]:
    "Clips `(b, 4, t, 64, 64)`, frames `FINE` apart, after the start of the flow, and their labels."
    sim = get_preset("laptop").sim("shear_flow")
    rng = np.random.default_rng(SEED)
    even = (np.arange(FLOWS) + 0.5) / FLOWS
    ranges = (sim.ranges[name] for name in ("Reynolds", "Schmidt"))
    labels = np.stack([low * (high / low) ** rng.permutation(even) for low, high in ranges], axis=1)
    start = round(1.6 / FINE)
    found = simulate(*labels.T, range(SEED, SEED + FLOWS), grid=64, dt=sim.dt, frame_dt=FINE, n_frames=start + frames)
    velocity = np.moveaxis(found["velocity"], -1, 1)
    fields = np.concatenate([found["tracer"][:, None], found["pressure"][:, None], velocity], axis=1)
    return torch.from_numpy(fields[:, :, start:]).float(), labels


def clips(x: torch.Tensor, encoder: LoadedEncoder) -> dict[str, Callable[[], torch.Tensor]]:
    "The clips of the guide, each as tokens of the encoder."
    frames, _, n = encoder.info["shape"]
    dt = encoder.info["dt"]
    every = round(dt / FINE)
    right = truncated(x[:, :, : every * frames : every], n)
    fine = truncated(x, n)

    def tokens(clip: torch.Tensor, **options) -> torch.Tensor:
        return torch.from_numpy(encoder.embed(clip, dt=dt, pool=False, **options))

    @torch.no_grad()
    def bare(clip: torch.Tensor) -> torch.Tensor:
        return encoder(encoder.normalise(clip))

    return {
        "as in training": lambda: tokens(right),
        "grid of 64x64, each point the mean of its area": lambda: tokens(
            averaged(x[:, :, : every * frames : every], n)
        ),
        "grid of 64x64 as it is, `any_grid=True`": lambda: tokens(x[:, :, : every * frames : every], any_grid=True),
        f"frames {3 * FINE:g} apart, interpolated": lambda: tokens(at_rate(fine[:, :, ::3], 3 * FINE, dt, frames)),
        f"frames {6 * FINE:g} apart, interpolated": lambda: tokens(at_rate(fine[:, :, ::6], 6 * FINE, dt, frames)),
        f"frames {8 * FINE:g} apart, interpolated": lambda: tokens(at_rate(fine[:, :, ::8], 8 * FINE, dt, frames)),
        f"frames {dt / 2:g} apart, said to be {dt:g}": lambda: tokens(fine[:, :, : frames * every // 2 : every // 2]),
        f"frames {dt / 4:g} apart, said to be {dt:g}": lambda: tokens(fine[:, :, : frames * every // 4 : every // 4]),
        "12 frames, the last one held": lambda: tokens(held(right[:, :, :12], frames)),
        "8 frames, the last one held": lambda: tokens(held(right[:, :, :8], frames)),
        "12 frames, fewer tokens": lambda: bare(right[:, :, :12]),
        "8 frames, fewer tokens": lambda: bare(right[:, :, :8]),
    }


def measured() -> dict:
    "Errors of the probes of the shipped encoder on all of these clips."
    name = next(p.name for p in sorted(SHIPPED.iterdir()) if p.name.startswith("shear_flow"))
    encoder = physrep.load_encoder(name)
    probes = {probe: physrep.load_probe(name, probe) for probe in PROBES}
    x, labels = flows(frames=8 * 9 + 1)
    truth = np.log10(labels)
    rows = []
    for clip, made in clips(x, encoder).items():
        features = Features(made(), labels, np.arange(FLOWS))
        row: dict = {"clip": clip}
        for probe, one in probes.items():
            error = ((np.log10(one.predict(features)) - truth) / truth.std(0)) ** 2
            row[probe] = dict(zip(("Reynolds", "Schmidt"), error.mean(0).round(3).tolist()))
        rows.append(row)
    facts = {"encoder": name, "digest": encoder_digest(encoder), "flows": FLOWS}
    return facts | {"probes": list(PROBES), "labels": ["Reynolds", "Schmidt"], "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(measured(), sys.stdout, indent=1)
    print()
