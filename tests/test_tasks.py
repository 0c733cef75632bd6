"""Tasks: how much is hidden and where, as a function of the seeds alone; what has no room is refused."""

from math import ceil

import numpy as np
import pytest
import torch

from physrep.core.randomness import sample_seeds
from physrep.data.batches import View
from physrep.objectives.tasks import (
    MULTI_BLOCK,
    TASKS,
    Blocks,
    Future,
    Next,
    Nothing,
    Pair,
    Tube,
    Window,
    interpolate_hidden,
    make_task,
    persistence,
    pixel_mask,
    tube_mask,
)

SHAPE, GRID, PATCH = (16, 32, 32), (4, 8, 8), (4, 4, 4)
SEEDS = sample_seeds(0, 0, 0, list(range(32)))
HIDING = [Tube(0.75), Tube(0.9), *MULTI_BLOCK, Blocks(1, 0.25, (1.0, 1.0)), Future(8), Future(4)]


@pytest.mark.parametrize("task", HIDING, ids=str)
def test_every_sample_hides_and_shows_as_much(task):
    hidden, shown = task.masks(SEEDS, GRID, SHAPE)
    assert hidden.shape == shown.shape == (32, 256) and hidden.dtype == shown.dtype == torch.bool
    assert len(set(hidden.sum(1).tolist())) == len(set(shown.sum(1).tolist())) == 1
    assert hidden.any() and shown.any() and not (hidden & shown).any()
    again = task.masks(SEEDS, GRID, SHAPE)
    assert torch.equal(hidden, again[0]) and torch.equal(shown, again[1])
    assert torch.equal(hidden, task.hidden(SEEDS, GRID, SHAPE))


def test_tubes_are_those_of_mae():
    hidden, shown = Tube(0.75).masks(SEEDS, GRID)
    assert torch.equal(hidden, tube_mask(SEEDS, GRID, 0.75)) and torch.equal(shown, ~hidden)
    assert torch.equal(Tube(0.75).hidden(SEEDS[5:9], GRID), hidden[5:9]), "whatever else is in the batch"


@pytest.mark.parametrize("grid", [(4, 8, 8), (8, 14, 14), (2, 16, 8), (2, 32, 8), (2, 8, 32)])
@pytest.mark.parametrize("scale", [0.1, 0.15, 0.3, 0.7])
def test_area_and_aspect_of_a_block(scale, grid):
    _, h, w = grid
    task = Blocks(1, scale)
    for aspect in np.linspace(0.75, 1.5, 7):
        height, width = task.size(grid, aspect)
        assert 1 <= height <= h and 1 <= width <= w
        assert abs(height * width - scale * h * w) <= max(height, width) / 2, "also where one axis is too short"
        if 1 < height < h and width < w:
            assert abs(height - (scale * h * w * aspect) ** 0.5) <= 0.5


def test_what_is_interpolated_stays_as_it_was():
    fields = torch.randn(2, 1, 2, 8, 8, dtype=torch.float64)
    before, mask = fields.clone(), torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 1] = True
    filled = interpolate_hidden(fields, mask, (2, 4, 4))
    assert torch.equal(fields, before) and not torch.equal(filled, fields)


def test_one_block_is_a_rectangle_of_one_size_at_any_place():
    hidden, shown = Blocks(1, 0.2, (1.2, 1.2)).masks(SEEDS.repeat(8) + torch.arange(256), GRID)
    height, width = Blocks(1, 0.2).size(GRID, 1.2)
    assert (hidden.sum(1) == 4 * height * width).all() and torch.equal(shown, ~hidden), "nothing has to be cut"
    corners = set()
    for mask in hidden.view(-1, *GRID):
        assert (mask == mask[0]).all(), "all frames"
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert len(rows) == height == rows[-1] - rows[0] + 1 and len(columns) == width == columns[-1] - columns[0] + 1
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) == (8 - height + 1) * (8 - width + 1)


def test_blocks_have_one_size_a_batch_and_places_of_the_sample():
    task = Blocks(1, 0.2)
    heights = set()
    for k in range(40):
        blocks = task.hidden(SEEDS + k, GRID).view(-1, *GRID)[:, 0]
        of_batch = set(blocks.any(2).sum(1).tolist())
        assert len(of_batch) == 1
        heights |= of_batch
    assert heights == {3, 4}, "another batch has another size"
    fixed = Blocks(1, 0.2, (1.0, 1.0))
    assert torch.equal(fixed.hidden(SEEDS[3:7], GRID), fixed.hidden(SEEDS, GRID)[3:7])


@pytest.mark.parametrize("task", MULTI_BLOCK, ids=str)
def test_cut_lists_lie_inside_and_outside_of_the_blocks_without_preference(task):
    hidden, shown = (m.view(-1, *GRID)[:, 0] for m in task.masks(torch.arange(600), GRID))
    least = max(1, round(task.least_shown * 64))
    assert (shown.sum((1, 2)) >= least).all()
    assert ((~hidden & ~shown).sum((1, 2)) > 0).any(), "what is cut is neither asked for nor shown"
    for mask in (hidden, shown):
        share = mask.float().mean(0)
        for flipped in (share.flip(0), share.flip(1)):
            assert (share - flipped).abs().max() < 0.12, "raster order would prefer the top"


def test_future_hides_the_last_frames():
    hidden = Future(8).hidden(SEEDS, GRID, SHAPE).view(-1, *GRID)
    assert not hidden[:, :2].any() and hidden[:, 2:].all()
    pixels = pixel_mask(hidden.flatten(1), GRID, PATCH)
    assert not pixels[:, :, :8].any() and pixels[:, :, 8:].all()


@pytest.mark.parametrize(
    "task, grid, message",
    [
        (Tube(0.01), (4, 4, 4), "hides no patch"),
        (Tube(0.99), (4, 4, 4), "hides every patch"),
        (Blocks(1, 0.9), (4, 2, 2), "takes 2 x 2 of the 2 x 2 places"),
        (Blocks(80, 0.5), GRID, "in 100 draws: choose fewer or smaller blocks"),
        (Future(16), GRID, "at least one must be shown"),
        (Future(6), GRID, "must be a multiple of the 4 frames of a token"),
        (Next(), GRID, "hides no tokens; these do: tube, blocks, future"),
    ],
)
def test_what_has_no_room_is_refused(task, grid, message):
    with pytest.raises(ValueError, match=message):
        task.masks(SEEDS, grid, SHAPE)


def test_future_needs_the_shape():
    with pytest.raises(ValueError, match="needs shape=.t, h, w. of the clip"):
        Future(8).hidden(SEEDS, GRID)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tubes", {}, "unknown task 'tubes'; valid: tube, blocks, future, next, window, pair, none"),
        ("tube", {"share": 0.5}, "has no option share; it has: ratio$"),
        ("tube", {"name": "x"}, "has no option name"),
        ("tube", {"ratio": 1.0}, "between 0 and 1, got 1.0"),
        ("blocks", {"count": 0}, "count of task 'blocks' must be an int of at least 1, got 0"),
        ("blocks", {"scale": 1.5}, "must be shares of the frame, got 1.5"),
        ("blocks", {"aspect": (2.0, 1.0)}, "must be a range"),
        ("future", {"frames": 0}, "at least 1, got 0"),
        ("next", {"frames": 1.5}, "at least 1, got 1.5"),
        ("window", {"offset": 0}, "offset of task 'window' must be an int of at least 1, got 0"),
        ("pair", {"gap": -1}, "gap must be an int of at least 0, got -1"),
        ("pair", {"of": "flow"}, "valid: trajectory, window, labels"),
        ("none", {"ratio": 0.5}, "has no option ratio; it has: none"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


def test_views():
    clip = View(16)
    for task in (Tube(), Blocks(), Future(8), Nothing()):
        assert task.views(SHAPE) == (clip,)
    assert Next(2).views(SHAPE) == (clip, View(2, offset=16))
    assert Window().views(SHAPE) == (clip, View(16, offset=16))
    assert Window(4).views(SHAPE) == (clip, View(16, offset=4))
    for of in ("trajectory", "window", "labels"):
        assert Pair(of=of).views(SHAPE) == (clip, View(16, offset=None, own_symmetry=True, of=of))
    assert Pair(gap=3).views(SHAPE)[1].gap == 3


def test_every_task_says_what_it_asks():
    for name, cls in TASKS.items():
        task = make_task(name)
        assert task == cls() and task.name == name
        assert task.question.endswith("?") and "\n" not in task.question and task.trivial
    assert make_task("blocks", aspect=[0.5, 2.0]) == Blocks(aspect=(0.5, 2.0)), "as it comes from JSON"


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
def test_interpolation_solves_the_laplace_equation(periodic):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 16, 12)
    mask = torch.cat([tube_mask(SEEDS[:1], (2, 4, 3), 0.6), Blocks(1, 0.5).hidden(SEEDS[1:2], (2, 4, 3))])
    found = interpolate_hidden(x, mask, (2, 4, 4), periodic=periodic)
    pixels = pixel_mask(mask, (2, 4, 3), (2, 4, 4))
    for b, c, t in np.ndindex(2, 3, 4):
        want = laplace_by_hand(x[b, c, t].double().numpy(), pixels[b, 0, t].numpy(), periodic)
        assert np.abs(found[b, c, t].numpy() - want).max() < 1e-5
    assert torch.equal(found[~pixels.expand_as(x)], x[~pixels.expand_as(x)])


def test_interpolation_of_frames_that_hide_different_places():
    x = torch.randn(2, 3, 8, 16, 16)
    mask = torch.zeros(2, 4, 16, dtype=torch.bool)
    mask[0, 0, 3] = mask[0, 2, 7:9] = mask[1, 1:3, 5] = True
    found = interpolate_hidden(x, mask.flatten(1), (2, 4, 4))
    pixels = pixel_mask(mask.flatten(1), (4, 4, 4), (2, 4, 4))
    for b, c, t in np.ndindex(2, 3, 8):
        want = laplace_by_hand(x[b, c, t].double().numpy(), pixels[b, 0, t].numpy(), (False, False))
        assert np.abs(found[b, c, t].numpy() - want).max() < 1e-5


def test_interpolation_does_not_look_behind_the_mask():
    x = torch.randn(2, 3, 16, 32, 32)
    mask = Tube(0.75).hidden(SEEDS[:2], GRID)
    other = torch.where(pixel_mask(mask, GRID, PATCH), torch.nan, x)
    assert torch.equal(interpolate_hidden(other, mask, PATCH), interpolate_hidden(x, mask, PATCH))
    assert interpolate_hidden(torch.ones_like(x), mask, PATCH).sub(1).abs().max() < 1e-6


def test_interpolation_that_has_nothing_to_start_from():
    x = torch.randn(2, 3, 16, 32, 32)
    with pytest.raises(ValueError, match="trivial answer is persistence"):
        interpolate_hidden(x, Future(8).hidden(SEEDS[:2], GRID, SHAPE), PATCH)
    with pytest.raises(ValueError, match="does not fit fields"):
        interpolate_hidden(x, Tube().hidden(SEEDS[:2], GRID), (2, 4, 4))


def test_persistence_repeats_the_last_frame():
    x = torch.randn(2, 3, 4, 8, 8)
    later = persistence(x, 3)
    assert later.shape == (2, 3, 3, 8, 8) and all(torch.equal(later[:, :, i], x[:, :, 3]) for i in range(3))


def test_least_shown_is_kept():
    for least in (0.0, 0.1, 0.2):
        shown = Blocks(2, 0.6, least_shown=least).masks(SEEDS, GRID)[1]
        assert shown.sum(1).min() >= 4 * max(1, ceil(round(least * 64)))
