"""Encoders that are trained on the labels of few flows: on which flows."""

import numpy as np
import pytest
import torch

from physrep.experiments import trained_on_few
from physrep.probing.features import Features
from physrep.probing.few_labels import draw_flows
from physrep.probing.reading import probe_splits
from physrep.results.data_efficiency import read_few
from physrep.training.run import label_scaler, resolve


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (2, 2), (3, 0)])
def test_training_sees_the_few_flows_that_probes_are_fitted_on(smoke_data, tmp_path, monkeypatch, seed, draw):
    run, seen = resolve("shear_flow", "supervised", "vit", "smoke", seed=seed), {}

    def stop(run, data_dir, run_dir, *, windows, **options):
        seen.update(windows)
        raise InterruptedError

    monkeypatch.setattr(trained_on_few, "pretrain", stop)
    with pytest.raises(InterruptedError):
        trained_on_few.train_on_few(run, smoke_data, tmp_path, numbers=[8], progress=False)
    train = probe_splits(run, smoke_data, ("train",))["train"]
    features = Features(torch.zeros(len(train), 1, 1), train.targets(np.arange(len(train))), train.window_groups())
    drawn = draw_flows(features, label_scaler(run, train), 8, draw)
    assert len(drawn) == 8 < len(set(train.groups)) and set(seen["train"].groups) == set(drawn)


def test_a_result_is_of_its_draw_alone_and_read_without_one_of_all_labels(smoke_data, tmp_path):
    run = resolve("shear_flow", "supervised", "vit", "smoke", seed=1, steps=4)
    path = trained_on_few.train_on_few(run, smoke_data, tmp_path, numbers=[8], progress=False)
    found = read_few([], [path.parent])
    assert set(found.draw) == {1} and set(found.probe) == {"linear", "knn", "kernel", "head"}
    assert read_few([path.parent]).equals(found) and set(found.split) == {"test", "shifted"}
