"""Takes the encoders and probes that come with the package from the runs of preset laptop: seed 0, both probes."""

import shutil

from physrep.models.pretrained import SHIPPED, load_encoder
from physrep.probing.frozen import load_probe
from physrep.training.run import resolve

SHIPPED_ROWS = [
    ("active_matter", "mae", "vit"),
    ("rayleigh_benard", "invariance", "vit"),
    ("shear_flow", "forecast", "vit"),
]
FILES = ("encoder.safetensors", "probe-linear.safetensors", "probe-attentive.safetensors")

if __name__ == "__main__":
    for row in SHIPPED_ROWS:
        folder, target = resolve(*row, "laptop").folder(), SHIPPED / "-".join(row)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise SystemExit(f"{folder} has no {', '.join(missing)}; run `make reproduce` first")
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        load_encoder(target)
        for name in FILES[1:]:
            load_probe(target / name)
        print(f"{target.name}: {sum((target / name).stat().st_size for name in FILES) / 1e6:.1f} MB")
