"""Writes figures/gallery/index.html: flows of all systems with the answers of all readers, in one file."""

import torch

from physrep.core.files import project_root
from physrep.explore.gallery import write_gallery

if __name__ == "__main__":
    torch.set_num_threads(1)
    path = write_gallery(project_root() / "figures" / "gallery" / "index.html")
    print(f"{path.relative_to(project_root())}: {path.stat().st_size / 1e6:.2f} MB")
