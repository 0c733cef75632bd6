"""What a record of a result holds, and when a result is stale."""

import subprocess

import pytest

from physrep.core import provenance as module
from physrep.core.provenance import numbers, old_numbers, provenance


@pytest.mark.parametrize(
    "then, kinds, stale",
    [
        ({"PHYSICS": 1, "TRAINING": 2, "PROBING": 3}, (), []),
        ({"PHYSICS": 1, "TRAINING": 1, "PROBING": 3}, (), ["TRAINING was 1, is 2"]),
        ({"PHYSICS": 1, "TRAINING": 1, "PROBING": 3}, ("PHYSICS", "PROBING"), []),
        ({"PHYSICS": 0, "TRAINING": 2}, ("PHYSICS", "PROBING"), ["PHYSICS was 0, is 1", "PROBING was None, is 3"]),
        (None, ("PHYSICS",), ["PHYSICS was None, is 1"]),  # of a version that held none
    ],
)
def test_a_record_is_stale_by_the_integers_that_it_depends_on(then, kinds, stale, monkeypatch):
    for name, value in {"PHYSICS": 1, "TRAINING": 2, "PROBING": 3}.items():
        monkeypatch.setattr(module, name, value)
    assert old_numbers({"numbers": then} if then else {}, *kinds) == stale
    assert old_numbers(provenance()) == [] and numbers("TRAINING") == {"TRAINING": 2}


def test_the_commit_is_that_of_the_checkout_and_of_no_other_project(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        about = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *about, *words], check=True, capture_output=True)

    def found(package) -> tuple:
        monkeypatch.setattr(module, "_PACKAGE", package)
        record = provenance()
        return record["commit"], record["dirty"]

    package = tmp_path / "physrep"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    assert found(package) == (None, None), "no repository"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = found(package)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "notes.txt").write_text("no code")
    assert found(package) == (commit, False)
    (package / "a.py").write_text("x = 2\n")
    assert found(package) == (commit, True)
    installed = tmp_path / ".venv" / "lib" / "physrep"
    installed.mkdir(parents=True)
    assert found(installed) == (None, None), "the repository is that of the environment"
