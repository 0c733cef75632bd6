"""Notebooks in git: nbdev's merge driver, and its hook that trusts notebooks after a merge.

What `nbdev_install_hooks` does, within .git alone: no file in the working tree, nothing in ~/.jupyter, no hook of yours
replaced, and the driver works without an activated environment. `.gitattributes` names the driver. To undo it:
`git config --remove-section merge.nbdev-merge` and `rm .git/hooks/post-merge`.
"""

import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MARK = "# physrep: trust notebooks after a merge"


def install(root: Path) -> str:
    "Sets the merge driver and the hook of a clone; returns what was done."
    merge, trust = (quote(str(BIN / name)) for name in ("nbdev_merge", "nbdev_trust"))
    # without the environment git merges notebooks as it merges text
    driver = f"if [ -x {merge} ]; then {merge} %O %A %B %P; else git merge-file %A %O %B; fi"
    for key, value in (("name", "resolve conflicts with nbdev_fix"), ("driver", driver)):
        subprocess.run(["git", "config", "--local", f"merge.nbdev-merge.{key}", value], cwd=root, check=True)
    hook = root / ".git" / "hooks" / "post-merge"
    if hook.exists() and MARK not in hook.read_text(encoding="utf-8"):
        return f"merge driver of notebooks set; {hook.relative_to(root)} is yours and stays as it is"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{MARK}\n[ ! -x {trust} ] || {trust} >/dev/null\n", encoding="utf-8")
    hook.chmod(0o755)
    return "merge driver and post-merge hook of notebooks set"


if __name__ == "__main__":
    if (ROOT / ".git").is_dir() and not os.environ.get("CI"):
        try:
            print(install(ROOT))
        except (OSError, subprocess.CalledProcessError) as error:  # an installation does not fail for it
            print(f"hooks of notebooks not set: {error}")
