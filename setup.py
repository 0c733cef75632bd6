"""Package metadata is in settings.ini (nbdev); this file only hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Physics",
    ],
    packages=setuptools.find_packages(include=["physrep", "physrep.*"]),
    package_data={"physrep": ["py.typed", "weights/*/*.safetensors", "weights/*/README.md"]},
    entry_points={"console_scripts": ["physrep = physrep.experiments.command:main"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "docs": cfg["docs_requirements"].split(),
        "explore": cfg["explore_requirements"].split(),
        "download": cfg["download_requirements"].split(),
        "hub": cfg["hub_requirements"].split(),
        "remote": cfg["remote_requirements"].split(),
        "slurm": cfg["slurm_requirements"].split(),
        "well": cfg["well_requirements"].split(),
    },
    zip_safe=False,
)
