"""Takes the encoders and probes that come with the package from the runs of preset laptop: seed 0, both probes.

Beside them it writes the heads of summary statistics, with the errors of all readers on `test`: physrep.explore shows
them."""

import shutil

from physrep.core.files import default_data_dir
from physrep.explore.readers import measured_errors, write_statistics
from physrep.models.pretrained import SHIPPED, load_encoder
from physrep.probing.frozen import load_probe
from physrep.probing.reading import probe_splits
from physrep.training.run import baseline_folder, resolve

SHIPPED_ROWS = [
    ("active_matter", "mae", "vit"),
    ("rayleigh_benard", "invariance", "vit"),
    ("shear_flow", "forecast", "vit"),
]
FILES = ("encoder.safetensors", "probe-linear.safetensors", "probe-attentive.safetensors")
BASELINES = ("statistics", "equations")

if __name__ == "__main__":
    for row in SHIPPED_ROWS:
        run, target = resolve(*row, "laptop"), SHIPPED / "-".join(row)
        folder = run.folder()
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise SystemExit(f"{folder} has no {', '.join(missing)}; run `make tuned` first")
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        load_encoder(target)
        for name in FILES[1:]:
            load_probe(target / name)
        baselines = {name: baseline_folder(name, run.system, run.preset) for name in BASELINES}
        errors = measured_errors({target.name: folder}, baselines)
        write_statistics(target, probe_splits(run, default_data_dir("laptop")), errors)
        size = sum(path.stat().st_size for path in target.iterdir())
        print(f"{target.name}: {size / 1e6:.1f} MB")
