"""How far the numbers of a run are from the committed ones: rows that belong together, seeds, what is missing."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

PATH = Path(__file__).resolve().parent.parent / "tools" / "compare_figures.py"
spec = importlib.util.spec_from_file_location("compare_figures", PATH)
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def table(*rows: tuple) -> pd.DataFrame:
    "Errors by row, as in Table 1."
    return pd.DataFrame(rows, columns=["objective", "probe", "value", "seeds", "by_seed", "seconds"])


OLD = table(("mae", "linear", 0.4, 2, "0.3 0.5", 9.0), ("jepa", "linear", 0.7, 2, "0.7 0.7", 9.0))


def test_equal_tables_differ_by_nothing_and_seconds_do_not_count():
    counted, pairs, notes = compare.differences(OLD.assign(seconds=1.0), OLD)
    assert counted == {"rows": 2, "numbers": 6} and max(pair[0] for pair in pairs) == 0 and notes == []


def test_a_changed_number_is_found_in_its_row():
    counted, pairs, _ = compare.differences(OLD.assign(value=[0.4, 0.65]), OLD)
    gap, column, row, old, new = max(pairs, key=lambda pair: pair[0])
    assert (gap, column, row, old, new) == (pytest.approx(0.05), "value", "jepa linear", 0.7, 0.65)


def test_one_seed_is_compared_with_the_same_seed_of_several():
    "`make reproduce` trains one seed, the committed table has more: their means are not comparable, seed 0 is."
    one = table(("mae", "linear", 0.31, 1, "0.31", 1.0), ("jepa", "linear", 0.7, 1, "0.7", 1.0))
    one["by_seed"] = one.by_seed.astype(float)  # as it is read from a file: a single number
    counted, pairs, notes = compare.differences(one, OLD)
    assert counted == {"rows": 2, "numbers": 2} and {pair[1] for pair in pairs} == {"by_seed"}
    assert sorted(pair[0] for pair in pairs) == [0, pytest.approx(0.01)]
    assert notes == ["2 row(s) of other numbers of seeds, compared in their order"]


def test_a_difference_is_set_beside_the_spread_of_seeds():
    "0.3 and 0.5 have a standard deviation of 0.14; seeds that are all equal have none, and say nothing."
    one = table(("mae", "linear", 0.31, 1, "0.31", 1.0), ("jepa", "linear", 0.7, 1, "0.9", 1.0))
    one["by_seed"] = one.by_seed.astype(float)
    assert compare.beside_seeds(one, OLD) == [pytest.approx(0.01 / 0.1414, rel=1e-3)]
    both = table(("mae", "linear", 0.4, 2, "0.3 0.7", 9.0), ("jepa", "linear", 0.7, 2, "0.7 0.7", 9.0))
    assert compare.beside_seeds(both, OLD) == [0, pytest.approx(0.2 / 0.1414, rel=1e-3)]
    untrained = {"objective": ["random", "random.circular"]}
    assert compare.beside_seeds(both.assign(**untrained), OLD.assign(**untrained)) == []
    assert compare.beside_seeds(one, one) == [] == compare.beside_seeds(one.drop(columns="by_seed"), OLD)


def test_lists_of_other_lengths_are_infinitely_far_apart():
    _, pairs, _ = compare.differences(OLD.assign(by_seed=["0.3", "0.7 0.7"]), OLD)
    assert max(pair[0] for pair in pairs) == float("inf")


def test_the_report_names_what_is_missing_and_the_largest_difference(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
        OLD.to_csv(folder / "table1.csv", index=False)
    assert "no number differs" in compare.report(new, old)
    OLD.assign(value=[0.4, 0.65]).to_csv(new / "table1.csv", index=False)
    OLD.to_csv(old / "grid.csv", index=False)
    said = compare.report(new, old)
    assert "largest difference: 0.05, 0.7 committed and 0.65 now" in said and "row: jepa linear" in said
    assert "grid    committed, not drawn here" in said
    assert "grid" not in compare.report(new, old, ("table1",))
    assert "half within 0 and 100 % within 1 standard deviation of seeds" in said
    OLD.assign(by_seed=["0.3 0.7", "0.7 0.7"]).to_csv(new / "table1.csv", index=False)
    assert "half within 0.71 and 50 % within 1 standard deviation of seeds" in compare.report(new, old)
    assert "no tables in" in compare.report(tmp_path, old) and "nothing committed in" in compare.report(new, tmp_path)
    new.joinpath("table1.csv").write_text("")
    assert "table1  not comparable" in compare.report(new, old)


@pytest.mark.parametrize("name", compare.TIMES)
def test_a_table_of_times_is_compared_only_if_it_is_asked_for(tmp_path, name):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, value in ((new, 0.4), (old, 0.9)):
        folder.mkdir()
        OLD.to_csv(folder / "table1.csv", index=False)
        OLD.assign(value=value).to_csv(folder / f"{name}.csv", index=False)
    assert name not in compare.report(new, old) and name in compare.report(new, old, (name,))
    assert (PATH.parent.parent / "figures" / f"{name}.csv").is_file(), "the name of a committed table"
