"""Sphinx configuration of the book. tools/docs/build.py fills the source folder; notebooks are not executed."""

import os
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # our extensions, and the package beside the notebooks

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]
repository = settings["git_url"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.apidoc", "book"]
exclude_patterns = ["api/modules.rst"]

# notebooks: as they are committed
suppress_warnings = ["myst.header", "myst.xref_missing"]  # a level that is skipped; tests/test_docs.py checks links
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # would be fetched from the network; widgets need a kernel, and their pages say how to get one
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
myst_heading_slug_func = "book.jupyter_slug"

# API: from the docstrings
apidoc_modules = [{"path": str(ROOT / "physrep"), "destination": "api"}]
apidoc_exclude_patterns = [str(ROOT / "physrep" / "_modidx.py")]
if only := os.environ.get("BOOK_ONLY", "").split():  # a quick look has the API of these packages alone
    packages = [p for p in (ROOT / "physrep").iterdir() if p.is_dir() and not any(n.startswith(p.name) for n in only)]
    apidoc_exclude_patterns += [f"{p}*" for p in packages]
apidoc_automodule_options = ["members", "show-inheritance"]
apidoc_max_depth = 2
apidoc_separate_modules = True
apidoc_module_first = True
autodoc_inherit_docstrings = False  # those of torch are no Markdown
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a light theme that asks nothing of the network
html_theme = "pydata_sphinx_theme"
html_title = f"{project} {version}"
html_static_path = [str(HERE / "static")]
html_css_files = ["book.css"]
html_context = {"default_mode": "light"}
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "github_url": repository,
    "navbar_align": "left",
    "navbar_end": ["navbar-icon-links"],
    "navbar_persistent": ["search-button"],
    "header_links_before_dropdown": 8,
    "show_nav_level": 1,
    "navigation_depth": 3,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
    "use_edit_page_button": False,
}
html_sidebars = {"index": [], "nbs/glossary": [], "figures": [], "search": []}
