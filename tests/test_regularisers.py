"""Regularisers against their formulas: VICReg, its pooled kind, SIGReg; precision, order of rows, resume."""

import math
from inspect import signature

import pytest
import torch

from physrep.core.randomness import generator
from physrep.objectives.emulators import NextFrame, NormalisedPixels
from physrep.objectives.invariance import Invariance
from physrep.objectives.jepa import JEPA, JEPASig, VICRegOnly
from physrep.objectives.regularisers import (
    NoRegulariser,
    PooledVICReg,
    SIGReg,
    VICReg,
    squared_covariance,
    variance_hinge,
    vicreg_terms,
)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def all_of_them() -> dict[str, torch.nn.Module]:
    "Each regulariser, for features of width 6."
    pooled = dict(invariance=0, dims=(8, 5))
    return {
        "none": NoRegulariser(),
        "vicreg": VICReg(40, 2),
        "vicreg in chunks": VICReg(40, 2, chunks=3),
        "pooled": PooledVICReg(6, **pooled),
        "pooled, layer norm": PooledVICReg(6, norm="layer", **pooled),
        "sigreg": SIGReg(16, weight=0.05),
    }


@pytest.mark.parametrize("name", all_of_them())
def test_autocast_changes_nothing(name):
    regulariser = all_of_them()[name].eval()  # running statistics, so that a second call is the same call
    features = torch.randn(12, 4, 6) + 3
    plain = regulariser(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (features[0] @ features[0].T).dtype == torch.bfloat16  # what a regulariser must not do
        inside = regulariser(features)
    assert plain.keys() == inside.keys() and all(torch.equal(plain[k], inside[k]) for k in plain)
    half = regulariser(features.bfloat16())
    assert all(torch.equal(half[k], v) for k, v in regulariser(features.bfloat16().float()).items())


def test_backward_inside_autocast_is_float32():
    gradients = []
    for enabled in (False, True):
        features = torch.linspace(-2, 2, 64 * 6).sin().view(64, 6).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            SIGReg(16)(features)["loss"].backward()  # products of matrices here as well
        gradients.append(features.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["vicreg in chunks", "sigreg"])
def test_random_numbers_depend_on_seed_and_update_only(name):
    features = torch.randn(60, 6)
    one, other = all_of_them()[name], all_of_them()[name]
    losses = []
    for k in range(4):
        torch.manual_seed(k)
        one.after_step(k, 10)
        losses.append(one(features)["loss"])
    assert len({float(loss) for loss in losses}) == 4
    other.load_state_dict(one.state_dict())  # a run that goes on
    assert torch.equal(other(features)["loss"], losses[3])
    other.seed = 1
    assert not torch.equal(other(features)["loss"], losses[3])


def test_what_is_refused():
    z = torch.randn(40, 6)
    for attempt, message in (
        (lambda: VICReg()(z[:1]), "at least 12 samples"),
        (lambda: VICReg().eval()(z[:1]), "at least two rows"),
        (lambda: PooledVICReg(6, invariance=0)(z[:1]), "more than 1 value"),
        (lambda: SIGReg()(z[:1]), "at least two rows"),
        (lambda: VICReg(chunks=4)(z), "at least 12 samples per chunk.*at most chunks=3"),
        (lambda: VICReg(-1, 1), "variance must be finite and not negative, got -1"),
        (lambda: VICReg(chunks=0), "chunks must be at least 1, got 0"),
        (lambda: PooledVICReg(6)(z), "compares two sides"),
        (lambda: PooledVICReg(6, norm="group"), "norm must be one of batch, layer"),
        (lambda: SIGReg(points=1), "points >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


# VICReg


def literal_vicreg(z: torch.Tensor) -> tuple[float, float]:
    "Variance and covariance in loops over plain numbers."
    rows = z.tolist()
    n, d = len(rows), len(rows[0])
    mean = [sum(row[c] for row in rows) / n for c in range(d)]
    variance, covariance = 0.0, 0.0
    for c in range(d):
        for e in range(d):
            cov = sum((row[c] - mean[c]) * (row[e] - mean[e]) for row in rows) / (n - 1)
            if c == e:
                variance += max(0.0, 1 - math.sqrt(cov + 1e-4)) / 2 / d
            else:
                covariance += cov**2 / d
    return variance, covariance


def test_vicreg_formula_in_loops():
    z, y = 0.7 * torch.randn(30, 4), 0.9 * torch.randn(30, 4) + 2
    variance, covariance = literal_vicreg(z)
    parts = VICReg(40, 2)(z)
    assert set(parts) == {"loss", "variance", "covariance"}
    assert parts["variance"] == pytest.approx(variance, rel=1e-4)
    assert parts["covariance"] == pytest.approx(covariance, rel=1e-4)
    both = VICReg(40, 2)(z, y)
    expected = 40 * (variance + literal_vicreg(y)[0]) + 2 * (covariance + literal_vicreg(y)[1])
    assert both["loss"] == pytest.approx(expected, rel=1e-4)
    assert both["invariance"] == pytest.approx(float((z - y).square().mean()), rel=1e-5)


def test_chunks_are_shuffled_in_an_order_that_depends_on_the_update():
    regulariser, z = VICReg(40, 2, chunks=4, seed=3), torch.randn(62, 5)
    regulariser.after_step(7, 10)
    order = torch.randperm(62, generator=generator("vicreg order", 3, 7))
    by_hand = [literal_vicreg(z[i]) for i in order.tensor_split(4)]  # the last chunks are smaller
    parts = regulariser(z)
    assert parts["variance"] == pytest.approx(sum(v for v, _ in by_hand) / 4, rel=1e-4)
    assert parts["covariance"] == pytest.approx(sum(c for _, c in by_hand) / 4, rel=1e-4)
    few = regulariser.eval()(z[:7])
    assert few["covariance"] == pytest.approx(literal_vicreg(z[:7])[1], rel=1e-4), "what is measured is one chunk"


def test_float64_stays_and_gradients_are_finite_at_collapse():
    z = (0.5 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(variance_hinge, z) and torch.autograd.gradcheck(squared_covariance, z)
    assert vicreg_terms([z])["covariance"].dtype == torch.float64
    constant = torch.ones(40, 4, requires_grad=True)  # the standard deviation is 0
    VICReg()(constant)["loss"].backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_pooled_formula(norm):
    regulariser = PooledVICReg(6, (16, 12), norm=norm, variance=40, covariance=2, invariance=3)
    a, b = torch.randn(9, 5, 6), torch.randn(9, 5, 6)  # 9 rows in 12 dimensions
    parts = regulariser(a, b)
    rows = [regulariser.projector(x) for x in (a, b)]
    by_hand = [literal_vicreg(z) for z in rows]
    assert parts["variance"] == pytest.approx(by_hand[0][0] + by_hand[1][0], rel=1e-4)
    assert parts["covariance"] == pytest.approx(by_hand[0][1] + by_hand[1][1], rel=1e-4)
    assert torch.equal(parts["invariance"], (rows[0] - rows[1]).square().mean().detach())
    assert (parts["rows"], parts["dims"]) == (9, 12)
    assert torch.allclose(parts["loss"], 40 * parts["variance"] + 2 * parts["covariance"] + 3 * parts["invariance"])
    assert torch.equal(regulariser(a, b)["loss"], regulariser(a.mean(1), b.mean(1))["loss"])


@pytest.mark.parametrize(
    "whole, part",
    [
        (JEPA, VICReg),
        (VICRegOnly, VICReg),
        (Invariance, PooledVICReg),
        (JEPASig, SIGReg),
        (NextFrame, NormalisedPixels),
        (PooledVICReg, VICReg),
    ],
)
def test_defaults_of_a_method_are_those_of_its_parts(whole, part):
    ours, theirs = ({p.name: p.default for p in signature(x).parameters.values()} for x in (whole, part))
    shared = (ours.keys() & theirs.keys()) - {"encoder", "target", "weight"}
    assert shared and {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


# SIGReg


def epps_pulley(u: torch.Tensor) -> torch.Tensor:
    "The statistic of samples `(n, s)` against N(0, 1), one for each column, in closed form and float64."
    u = u.double()
    pairs = torch.exp(-(u[:, None] - u[None]).square() / 2).mean(dim=(0, 1))
    single = torch.exp(-u.square() / 4).mean(dim=0)
    return math.sqrt(2 * math.pi) * (pairs - math.sqrt(2) * single + 1 / math.sqrt(3))


def test_sigreg_is_n_times_the_mean_over_unit_directions(monkeypatch):
    z, y = torch.randn(100, 6), 2 * torch.randn(100, 6)
    regulariser = SIGReg(32, 400, 8.0, weight=0.05)
    directions = regulariser.directions(6)
    assert torch.allclose(directions.norm(dim=0), torch.ones(32))
    exact = [100 * epps_pulley(x @ directions).mean() for x in (z, y)]
    both = regulariser(z, y)
    assert float(regulariser(z)["sigreg"]) == pytest.approx(float(exact[0]), rel=1e-3)
    assert float(both["sigreg"]) == pytest.approx(float(sum(exact) / 2), rel=1e-3)
    assert torch.allclose(both["loss"], 0.05 * both["sigreg"])
    monkeypatch.setattr("physrep.objectives.regularisers.AT_ONCE", 1)  # one direction at a time
    assert torch.allclose(regulariser(z, y)["loss"], both["loss"])
