"""Tasks: how much is hidden and where, as a function of the seeds alone; what has no room is refused."""

import numpy as np
import pytest
import torch

from physrep.core.randomness import sample_seeds
from physrep.objectives.tasks import (
    Blocks,
    Future,
    Next,
    Pair,
    Tube,
    interpolate_hidden,
    pixel_mask,
    tube_mask,
)

SHAPE, GRID, PATCH = (16, 32, 32), (4, 8, 8), (4, 4, 4)
SEEDS = sample_seeds(0, 0, 0, list(range(32)))
MULTI_BLOCK = [Blocks(8, 0.15), Blocks(2, 0.7)]


@pytest.mark.parametrize("task", [Tube(0.75), Tube(0.9), *MULTI_BLOCK, Blocks(1, 0.25), Future(8)], ids=str)
def test_every_sample_hides_and_shows_as_much(task):
    hidden, shown = task.masks(SEEDS, GRID, SHAPE)
    assert hidden.shape == shown.shape == (32, 256) and hidden.dtype == shown.dtype == torch.bool
    assert len(set(hidden.sum(1).tolist())) == len(set(shown.sum(1).tolist())) == 1
    assert hidden.any() and shown.any() and not (hidden & shown).any()
    assert torch.equal(hidden, task.masks(SEEDS, GRID, SHAPE)[0])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_tubes_hide_the_same_positions_of_all_frames_without_preference(ratio):
    mask = tube_mask(torch.arange(400), (3, 5, 7), ratio).view(400, 3, 35)
    assert (mask.sum(dim=2) == round(ratio * 35)).all() and (mask == mask[:, :1]).all()
    assert mask[:, 0].float().mean(dim=0).sub(ratio).abs().max() < 0.12
    assert torch.equal(tube_mask(torch.arange(5, 9), (3, 5, 7), ratio), mask[5:9].flatten(1)), "of the seed alone"


@pytest.mark.parametrize("grid", [(4, 8, 8), (2, 32, 8), (2, 8, 32)])
@pytest.mark.parametrize("scale", [0.1, 0.3, 0.7])
def test_area_and_aspect_of_a_block(scale, grid):
    _, h, w = grid
    for aspect in np.linspace(0.75, 1.5, 7):
        height, width = Blocks(1, scale).size(grid, aspect)
        assert 1 <= height <= h and 1 <= width <= w
        assert abs(height * width - scale * h * w) <= max(height, width) / 2, "also where one axis is too short"
        if 1 < height < h and width < w:
            assert abs(height - (scale * h * w * aspect) ** 0.5) <= 0.5


def test_one_block_is_a_rectangle_of_one_size_at_any_place():
    hidden, shown = Blocks(1, 0.2, (1.2, 1.2)).masks(SEEDS.repeat(8) + torch.arange(256), GRID, SHAPE)
    height, width = Blocks(1, 0.2).size(GRID, 1.2)
    assert (hidden.sum(1) == 4 * height * width).all() and torch.equal(shown, ~hidden), "nothing has to be cut"
    corners = set()
    for mask in hidden.view(-1, *GRID):
        assert (mask == mask[0]).all(), "all frames"
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert len(rows) == height == rows[-1] - rows[0] + 1 and len(columns) == width == columns[-1] - columns[0] + 1
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) == (8 - height + 1) * (8 - width + 1)
    fixed = Blocks(1, 0.2, (1.0, 1.0))
    part, whole = (fixed.masks(seeds, GRID, SHAPE)[0] for seeds in (SEEDS[3:7], SEEDS))
    assert torch.equal(part, whole[3:7]), "positions are those of the sample, whatever else is in the batch"


def test_the_share_that_stays_visible_is_one_of_the_frame():
    assert Blocks(2, 0.3, least_shown=0.5).least((4, 6, 8)) == 24
    assert Blocks(2, 0.3, least_shown=0.01).least((4, 6, 8)) == 1, "a position at least"


@pytest.mark.parametrize("task", MULTI_BLOCK, ids=str)
def test_cut_lists_lie_inside_and_outside_of_the_blocks_without_preference(task):
    hidden, shown = (m.view(-1, *GRID)[:, 0] for m in task.masks(torch.arange(600), GRID, SHAPE))
    assert (shown.sum((1, 2)) >= max(1, round(task.least_shown * 64))).all()
    assert ((~hidden & ~shown).sum((1, 2)) > 0).any(), "what is cut is neither asked for nor shown"
    for mask in (hidden, shown):
        share = mask.float().mean(0)
        for flipped in (share.flip(0), share.flip(1)):
            assert (share - flipped).abs().max() < 0.12, "raster order would prefer the top"


def test_future_hides_the_last_frames():
    pixels = pixel_mask(Future(8).masks(SEEDS, GRID, SHAPE)[0], GRID, PATCH)
    assert not pixels[:, :, :8].any() and pixels[:, :, 8:].all()


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: Tube(0.01).masks(SEEDS, (4, 4, 4), SHAPE), "hides 0 of the 16"),
        (lambda: Tube(0.99).masks(SEEDS, (4, 4, 4), SHAPE), "hides 16 of the 16"),
        (lambda: Blocks(1, 0.9).masks(SEEDS, (4, 2, 2), SHAPE), "takes 2 x 2 of the 2 x 2 positions"),
        (lambda: Blocks(80, 0.5).masks(SEEDS, GRID, SHAPE), "in 100 draws: choose fewer or smaller blocks"),
        (lambda: Future(16).masks(SEEDS, GRID, SHAPE), "at least one must be shown"),
        (lambda: Future(6).masks(SEEDS, GRID, SHAPE), "multiple of the 4 frames of a token"),
        (lambda: Next().masks(SEEDS, GRID, SHAPE), "hides no tokens"),
        (lambda: Blocks(scale=1.5), "must be shares of the frame"),
        (lambda: Blocks(aspect=(2.0, 1.0)), r"aspect \(low, high\)"),
        (lambda: Pair(gap=-1).views(SHAPE), "gap must be an int of at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def laplace_by_hand(image: np.ndarray, hidden: np.ndarray, periodic: tuple[bool, bool]) -> np.ndarray:
    "The dense linear system, pixel by pixel."
    places = [tuple(p) for p in np.argwhere(hidden)]
    number = {p: i for i, p in enumerate(places)}
    matrix, right = np.zeros((len(places),) * 2), np.zeros(len(places))
    for (i, j), row in number.items():
        for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            at = [i + di, j + dj]
            for axis in (0, 1):
                if periodic[axis]:
                    at[axis] %= image.shape[axis]
            if not all(0 <= a < n for a, n in zip(at, image.shape)):
                continue
            matrix[row, row] += 1
            if tuple(at) in number:
                matrix[row, number[tuple(at)]] -= 1
            else:
                right[row] += image[tuple(at)]
    out = image.copy()
    out[hidden] = np.linalg.solve(matrix, right)
    return out


@pytest.mark.parametrize("periodic", [(False, False), (True, False), (True, True)])
def test_interpolation_solves_the_laplace_equation_and_does_not_look_behind_the_mask(periodic):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 16, 12)
    blocks, _ = Blocks(1, 0.5).masks(SEEDS[1:2], (2, 4, 3), (4, 16, 12))
    mask = torch.cat([tube_mask(SEEDS[:1], (2, 4, 3), 0.6), blocks])
    before, pixels = x.clone(), pixel_mask(mask, (2, 4, 3), (2, 4, 4))
    found = interpolate_hidden(x, mask, (2, 4, 4), periodic=periodic)
    for b, c, t in np.ndindex(2, 3, 4):
        want = laplace_by_hand(x[b, c, t].double().numpy(), pixels[b, 0, t].numpy(), periodic)
        assert np.abs(found[b, c, t].numpy() - want).max() < 1e-5
    assert torch.equal(x, before) and torch.equal(found[~pixels.expand_as(x)], x[~pixels.expand_as(x)])
    other = torch.where(pixels, torch.nan, x)
    assert torch.equal(interpolate_hidden(other, mask, (2, 4, 4), periodic=periodic), found)
