"""One torch thread, and a small simulated data set that the tests share."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from physrep.core.files import default_data_dir
from physrep.data.generate import make_dataset
from physrep.training.presets import get_preset

torch.set_num_threads(1)  # for what is made once for all tests


# minutes each, with the workflow or stages in processes of their own
LONGEST = (
    "test_workflow.py",
    "test_command.py",
    "test_experiments.py",
    "test_notebooks.py",
    "test_docs.py",
    "test_distributed.py",
    "test_killed.py",
    "test_training.py",
    "test_app.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The longest files first, the others in the order of their names."
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    "A test that needs a GPU is skipped where there is none."
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and PyTorch finds none here")


@pytest.fixture(autouse=True)
def one_thread():
    "A test that needs more threads takes them; the next one has a single one again."
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smoke_data() -> Path:
    "A `data_dir` with the shear flow of preset smoke: `data/smoke`, made once and shared with the notebooks."
    folder = default_data_dir("smoke")
    make_dataset("shear_flow", get_preset("smoke").sim("shear_flow"), folder, workers=1, progress=False)
    return folder


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    "A disk of its own, of 8 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
