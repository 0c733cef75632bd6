"""Regularisers against their formulas: VICReg, its pooled kind, SIGReg; precision, order of rows, collapse, resume."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from physrep.core.randomness import generator
from physrep.objectives.regularisers import (
    NoRegulariser,
    PooledVICReg,
    ProjectedDistance,
    Projector,
    SIGReg,
    VICReg,
    distance_to_normal,
    epps_pulley,
    quadrature,
    spread,
    squared_covariance,
    unit_columns,
    variance_hinge,
    vicreg_loss,
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
def test_contract(name):
    regulariser = all_of_them()[name]
    features = torch.randn(12, 4, 6, requires_grad=True)
    parts = regulariser(features)
    assert parts["loss"].dtype == torch.float32 and parts["loss"].ndim == 0
    assert all(not value.requires_grad for part, value in parts.items() if part != "loss")
    assert regulariser.operations(48, 6) >= 0
    if name != "none":
        parts["loss"].backward()
        assert torch.isfinite(features.grad).all() and features.grad.abs().max() > 0


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
            loss = SIGReg(16)(features)["loss"]
            loss.backward()  # products of matrices here as well
        gradients.append(features.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["vicreg", "pooled", "pooled, layer norm", "sigreg"])
def test_order_of_rows_does_not_matter(name):
    regulariser = all_of_them()[name]
    features = torch.randn(40, 6)
    shuffled = features[torch.randperm(40)]
    for part, value in regulariser(features).items():
        assert torch.allclose(regulariser(shuffled)[part], value, rtol=1e-4), part


@pytest.mark.parametrize("name", ["vicreg in chunks", "sigreg"])
def test_random_numbers_depend_on_seed_and_step_only(name):
    features = torch.randn(60, 6)
    one, other = all_of_them()[name], all_of_them()[name]
    torch.manual_seed(1)
    losses = [one(features, step=k)["loss"] for k in range(4)]
    assert len({float(loss) for loss in losses}) == 4
    torch.manual_seed(2)
    assert torch.equal(other(features, step=2)["loss"], losses[2])
    one.after_step(2, 10)
    assert torch.equal(one(features)["loss"], losses[2])
    other.load_state_dict(one.state_dict())  # a run that goes on
    assert torch.equal(other(features)["loss"], losses[2])
    other.seed = 1
    assert not torch.equal(other(features)["loss"], losses[2])


@pytest.mark.parametrize("name", ["vicreg", "pooled", "sigreg"])
def test_one_row_is_refused(name):
    with pytest.raises(ValueError, match="at least two rows|more than 1 value|at least 12 samples"):
        all_of_them()[name](torch.randn(1, 6))


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_short_last_batch_of_held_out_windows_stops_no_training(chunks):
    "A training needs 12 rows a chunk; what is measured on fewer is noisy, and no reason to stop."
    regulariser, few, other = VICReg(1, 2, 3, chunks=chunks), torch.randn(7, 6), torch.randn(7, 6)
    with pytest.raises(ValueError, match="at least 12 samples per chunk"):
        regulariser(few, other)
    measured = regulariser.eval()(few, other)
    expected = vicreg_loss(few, other, variance=1, covariance=2, invariance=3, any_number=True)
    assert all(torch.equal(measured[name], value) for name, value in expected.items()), "one chunk"
    assert regulariser(few[:2], other[:2])["loss"] > 0 and VICReg(1, 2).eval()(few)["loss"] > 0
    with pytest.raises(ValueError, match="at least two rows"):
        regulariser(few[:1], other[:1])


def test_a_second_derivative_is_refused_where_there_is_none():
    z = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    t, weights = quadrature()
    value = ProjectedDistance.apply(z, torch.eye(3, dtype=torch.float64), t, weights).sum()
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        slope.square().sum().backward()


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
    assert parts["loss"] == pytest.approx(40 * variance + 2 * covariance, rel=1e-4)
    both = VICReg(40, 2, 3)(z, y)
    expected = 40 * (variance + literal_vicreg(y)[0]) + 2 * (covariance + literal_vicreg(y)[1])
    assert both["loss"] == pytest.approx(expected + 3 * float((z - y).square().mean()), rel=1e-4)


@pytest.mark.parametrize("chunks", [1, 5])
def test_vicreg_is_the_loss_of_jepa(chunks):
    z, y = torch.randn(60, 5), torch.randn(60, 5)
    weights = dict(invariance=2.0, variance=40.0, covariance=2.0, chunks=chunks)
    two = VICReg(**weights)(z, y)
    if chunks == 1:
        assert all(torch.equal(two[k], v) for k, v in vicreg_loss(z, y, **weights).items())
    else:  # another order of the rows
        assert two["invariance"] == pytest.approx(float((z - y).square().mean()), rel=1e-5)
        assert two["covariance"] == pytest.approx(float(vicreg_loss(z, y, **weights)["covariance"]), rel=0.6)
    one = VICReg(40, 2)(z)
    jepa = vicreg_loss(y, y, regularised=z, invariance=2, variance=40, covariance=2)
    assert torch.equal(one["loss"], jepa["loss"])


def test_chunks_are_shuffled_in_an_order_that_depends_on_the_step():
    regulariser, z = VICReg(40, 2, chunks=4, seed=3), torch.randn(60, 5)
    regulariser.after_step(7, 10)
    order = torch.randperm(60, generator=generator("vicreg order", 3, 7))
    by_hand = [literal_vicreg(z[i]) for i in order.split(15)]
    parts = regulariser(z)
    assert parts["variance"] == pytest.approx(sum(v for v, _ in by_hand) / 4, rel=1e-4)
    assert parts["covariance"] == pytest.approx(sum(c for _, c in by_hand) / 4, rel=1e-4)
    assert torch.equal(regulariser(z, step=7)["loss"], parts["loss"])
    assert not torch.equal(regulariser(z, step=8)["loss"], parts["loss"])


def test_spread_sums_its_sides_and_keeps_float64():
    z, y = torch.randn(40, 4, dtype=torch.float64), 0.1 * torch.randn(40, 4, dtype=torch.float64)
    both, one, other = spread([z, y]), spread([z]), spread([y])
    for term in ("variance", "covariance"):
        assert both[term].dtype == torch.float64 and torch.allclose(both[term], one[term] + other[term])
    assert spread([z.bfloat16()])["covariance"].dtype == torch.float32


def test_vicreg_gradients_in_float64():
    z = (0.5 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(variance_hinge, z) and torch.autograd.gradcheck(squared_covariance, z)


def test_vicreg_refuses():
    z = torch.randn(40, 6)
    with pytest.raises(ValueError, match="at least 12 samples per chunk"):
        VICReg(1, 1, chunks=4)(z)
    with pytest.raises(ValueError, match="compares two sides"):
        VICReg(1, 1, 1)(z)
    with pytest.raises(ValueError, match="one batch size and one width"):
        VICReg(1, 1)(z, torch.randn(40, 5))
    with pytest.raises(ValueError, match="variance must be finite and not negative, got -1"):
        VICReg(-1, 1)
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        VICReg(chunks=0)


# pooled VICReg


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
    expected = 40 * parts["variance"] + 2 * parts["covariance"] + 3 * parts["invariance"]
    assert torch.allclose(parts["loss"], expected)


def test_pooled_takes_tokens_and_pooled_features():
    regulariser = PooledVICReg(6, (8, 5), invariance=0)
    tokens = torch.randn(10, 4, 6)
    assert torch.equal(regulariser(tokens)["loss"], regulariser(tokens.mean(1))["loss"])
    assert regulariser(torch.randn(10, 1, 6))["rows"] == 10  # an encoder with one token


def test_pooled_gradients_in_float64():
    regulariser = PooledVICReg(3, (5, 4), norm="layer", invariance=2).double()
    a, b = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: regulariser(a, b)["loss"], (a, b))


def test_projector():
    projector = Projector(6, (16, 12, 5))
    assert projector(torch.randn(4, 7, 6)).shape == (4, 5)
    assert [type(m).__name__ for m in projector.layers][:3] == ["Linear", "BatchNorm1d", "ReLU"]
    assert [m.out_features for m in projector.layers if isinstance(m, torch.nn.Linear)] == [16, 12, 5]
    assert Projector(6, (5,), norm="layer")(torch.randn(4, 6)).shape == (4, 5)
    with pytest.raises(ValueError, match="unknown norm 'group'; valid: batch, layer"):
        Projector(6, norm="group")
    with pytest.raises(ValueError, match=r"dims must be the widths .* got \(\)"):
        Projector(6, ())


# SIGReg


@pytest.mark.parametrize("scale,shift", [(1.0, 0.0), (0.1, 0.0), (3.0, 1.0), (0.0, 0.0), (0.0, 2.0)])
def test_quadrature_is_near_the_closed_form(scale, shift):
    u = scale * torch.randn(200, 3, dtype=torch.float64) + shift
    exact = epps_pulley(u)
    assert torch.allclose(distance_to_normal(u, *quadrature(400, 8.0)), exact, atol=1e-8)
    assert (distance_to_normal(u, *quadrature()) - exact).abs().max() < 0.02


def test_closed_form_is_the_integral():
    u = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    t = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    phi = torch.exp(1j * t[:, None] * u).mean(1)
    integrand = (phi - torch.exp(-(t**2) / 2)).abs().square() * torch.exp(-(t**2) / 2)
    assert epps_pulley(u) == pytest.approx(float(torch.trapezoid(integrand, t)), abs=1e-9)


def test_values_at_collapse_and_for_normal_samples():
    for n in (64, 1024):
        assert SIGReg()(torch.zeros(n, 8))["sigreg"] / n == pytest.approx(0.409, abs=0.01)
    values = torch.stack([SIGReg()(torch.randn(256, 32))["sigreg"] for _ in range(40)])
    assert float(values.mean()) == pytest.approx(1.06, abs=0.05)
    assert 64 * float(epps_pulley(torch.zeros(64))) == pytest.approx(0.409 * 64, rel=1e-3)


def test_sigreg_is_n_times_the_mean_over_directions():
    z, y = torch.randn(100, 6), 2 * torch.randn(100, 6)
    regulariser = SIGReg(32, 400, 8.0, weight=0.05)
    exact = [100 * epps_pulley(x @ regulariser.directions(6)).mean() for x in (z, y)]
    assert float(regulariser(z)["sigreg"]) == pytest.approx(float(exact[0]), rel=1e-3)
    both = regulariser(z, y)
    assert float(both["sigreg"]) == pytest.approx(float(sum(exact) / 2), rel=1e-3)
    assert torch.allclose(both["loss"], 0.05 * both["sigreg"])


def test_directions_are_unit_vectors_and_zero_is_safe():
    a = SIGReg(64).directions(6)
    assert a.shape == (6, 64) and torch.allclose(a.norm(dim=0), torch.ones(64)) and a.device.type == "cpu"
    assert torch.equal(unit_columns(torch.zeros(4, 2)), torch.zeros(4, 2))


def test_sigreg_gradients_in_float64():
    regulariser = SIGReg(5, numbers=1)
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: regulariser(z)["loss"], z)


def test_sigreg_in_chunks_is_the_same_and_keeps_little():
    z = torch.randn(200, 6)
    losses, gradients, kept = [], [], []
    for numbers in (1, 5 * 200, 2**22):
        features = z.clone().requires_grad_()
        sizes = {}  # of what the graph keeps, by its place in memory
        keep = lambda x, s=sizes: s.update({x.data_ptr(): x.numel()}) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = SIGReg(64, numbers=numbers)(features)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(features.grad)
        kept.append(sum(sizes.values()))
    assert torch.allclose(torch.stack(losses), losses[0].expand(3), rtol=1e-5)
    assert all(torch.allclose(g, gradients[0], atol=1e-7) for g in gradients)
    assert max(kept) < 200 * 64  # rows x slices alone; with the points it would be 17 times as many


@pytest.mark.parametrize("points,t_max", [(2, 1.0), (17, 3.0), (41, 5.0)])
def test_fast_statistic_is_the_literal_one(points, t_max):
    t, weights = quadrature(points, t_max)
    z, a = torch.randn(60, 5, dtype=torch.float64, requires_grad=True), unit_columns(torch.randn(5, 7).double())
    fast, literal = ProjectedDistance.apply(z, a, t, weights), distance_to_normal(z @ a, t, weights)
    assert torch.allclose(fast, literal, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: ProjectedDistance.apply(z, a, t, weights), z)
    single = ProjectedDistance.apply(10 * z.float(), a.float(), t.float(), weights.float())
    assert torch.allclose(single.double(), distance_to_normal(10 * z @ a, t, weights), atol=1e-5)


def test_sigreg_refuses():
    with pytest.raises(ValueError, match="at least 2 points and a positive t_max, got 1 and 3"):
        SIGReg(points=1)
    with pytest.raises(ValueError, match="slices and numbers must be at least 1, got 0"):
        SIGReg(0)


# cost


def products(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_operations_hold_the_matrix_products():
    n, d = 256, 48
    z = torch.randn(n, d)
    assert products(lambda: VICReg()(z)) == 2 * n * d * d
    assert VICReg().operations(n, d) - 2 * n * d * d == 6 * n * d + 4 * d * d
    sigreg = SIGReg(32)
    assert products(lambda: sigreg(z)) == 2 * n * d * 32
    assert sigreg.operations(n, d) - 2 * n * d * 32 == 8 * 17 * n * 32
    pooled = PooledVICReg(d, (64, 40), invariance=0)
    by_hand = 2 * n * (d * 64 + 64 * 40) + 2 * n * 40 * 40
    assert products(lambda: pooled(z)) == by_hand
    assert by_hand < pooled.operations(n, d) < 1.5 * by_hand
    assert VICReg().operations(n, d, sides=2) > 2 * VICReg().operations(n, d)
