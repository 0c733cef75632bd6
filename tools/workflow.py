"""The workflow of a preset, one call at a time: a second one says so and waits.

    python tools/workflow.py laptop table1 --cores 2 --config preset=laptop

First comes the name of the preset, then what snakemake takes. Snakemake deletes the outputs of a job before it starts,
so a second workflow would take results away from the first one. Snakemake inherits the lock, which ends with the last
process that holds it: also where only this one is killed.
"""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(preset: str, *arguments: str, root: Path = ROOT) -> int:
    "Runs snakemake with these arguments while no other call works on the runs of that preset; its exit code."
    folder = root / "runs" / preset
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", *arguments]
    with open(folder / ".workflow.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"== another make works on runs/{preset}; waiting until it is done", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(command, cwd=root, pass_fds=[lock.fileno()]) as child:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:  # snakemake was told, too, and ends its jobs
                    continue


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("give the name of a preset, then what snakemake takes")
    sys.exit(main(*sys.argv[1:]))
