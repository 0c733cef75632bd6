"""Takes the encoders and probes that come with the package from the runs of preset laptop: seed 0, linear and attentive probe."""

import shutil
from pathlib import Path

from physrep.encoders.registry import SHIPPED, load_encoder
from physrep.probing import load_probe
from physrep.runs import resolve, run_folder

MODELS = [("shear_flow", "jepa", "convnext"), ("shear_flow", "mae", "vit"), ("shear_flow", "supervised", "vit")]
FILES = ("encoder.safetensors", "probe-linear.safetensors", "probe-attentive.safetensors")


def source(system: str, objective: str, encoder: str) -> Path:
    return run_folder(resolve(system, objective, encoder, "laptop"))


if __name__ == "__main__":
    for row in MODELS:
        folder, target = source(*row), SHIPPED / "-".join(row)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise SystemExit(f"{folder} has no {', '.join(missing)}; run `make reproduce` first")
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        load_encoder(target), [load_probe(target / name) for name in FILES[1:]]
        print(f"{target.name}: {sum((target / name).stat().st_size for name in FILES) / 1e6:.1f} MB")
