"""What further seeds change: which are shown, and how often the order of two rows is that of their seeds."""

import pandas as pd
import pytest

from physrep.results import seeds
from physrep.results.rows import ROWS, Row
from physrep.results.seeds import folders_of_seeds, order_changes
from physrep.training.presets import get_preset


def summary(errors: dict[str, tuple], **about) -> pd.DataFrame:
    "Mean errors of rows on a ViT by one probe in one system."
    usual = {"system": "shear_flow", "encoder": "vit", "probe": "kernel", "split": "test", "label": "mean"}
    usual |= {"metric": "mse"} | about
    return pd.DataFrame([usual | {"objective": k, "by_seed": v, "seeds": len(v)} for k, v in errors.items()])


def test_a_pair_counts_once_whatever_the_number_of_seeds():
    found = order_changes(summary({"mae": (1.0, 3.0, 1.0), "jepa": (2.0, 2.0, 2.0), "forecast": (0.5, 0.5, 0.4)}))
    found = found.set_index("row")
    assert found.pairs.to_dict() == {"MAE ViT": 2, "JEPA ViT": 2, "forecast ViT": 2, "all": 3}
    assert found.changed.to_dict() == {"MAE ViT": 1, "JEPA ViT": 1, "forecast ViT": 0, "all": 1}
    assert found.loc["MAE ViT", "largest ratio"] == 3 and found.loc["forecast ViT", "median ratio"] == 1.25


def test_systems_and_probes_are_told_apart():
    swapped, same = {"mae": (1.0, 3.0), "jepa": (2.0, 2.0)}, {"mae": (1.0, 1.1), "jepa": (2.0, 2.0)}
    tables = [summary(swapped), summary(same, probe="knn"), summary(same, system="active_matter")]
    found = order_changes(pd.concat(tables)).set_index("row")
    assert (found.loc["all", "pairs"], found.loc["all", "changed"]) == (3, 1)
    assert found.loc["MAE ViT", "median ratio"] == pytest.approx(1.1)


def test_one_seed_other_splits_and_rows_that_saw_labels_are_left_out():
    assert order_changes(summary({"mae": (1.0,), "jepa": (2.0,)})).empty
    assert order_changes(summary({"mae": (1.0, 3.0), "jepa": (2.0, 2.0)}, split="shifted")).empty
    assert order_changes(summary({"mae": (1.0, 3.0), "random": (2.0, 2.0), "supervised": (2.0, 2.0)})).pairs.max() == 0


def test_a_row_of_ones_own_is_compared_too():
    mine = Row("mae", "vit", "MAE of mine", tag="mine")
    found = order_changes(summary({"mae": (1.0, 3.0), "mae.mine": (2.0, 2.0)}), (*ROWS, mine)).set_index("row")
    assert found.loc["MAE of mine", "changed"] == 1


def test_rows_with_other_numbers_of_seeds_are_not_compared_and_rows_need_no_title():
    both = {
        "mae": (1.0, 3.0),
        "jepa": (2.0, 2.0),
        "mae.a": (1.0, 3.0),
        "mae.b": (2.5, 2.5),
        "forecast": (1.0, 3.0, 1.0),
    }
    found = order_changes(summary(both), (*ROWS, Row("mae", "vit", tag="a"), Row("mae", "vit", tag="b")))
    assert found.pairs.tolist() == [3, 3, 3, 3, 0, 6] and found.changed.tolist()[-1] == 4
    assert found.row.iloc[-2] == "forecast ViT"


def test_errors_of_zero_have_no_ratio():
    found = order_changes(summary({"mae": (0.0, 0.5), "jepa": (0.0, 0.0)})).set_index("row")
    assert found.loc["MAE ViT", "largest ratio"] == float("inf") and pd.isna(found.loc["JEPA ViT", "median ratio"])


def test_results_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results yet of mae-vit-"):
        folders_of_seeds(get_preset("smoke"), {"shear_flow": [Row("mae", "vit")]}, tmp_path)


def test_equal_errors_have_no_order_to_change():
    assert not seeds._changes((1.0, 1.0), (1.0, 2.0)) and seeds._changes((1.0, 3.0), (2.0, 2.0))
