"""Train, probe and compare self-supervised encoders of physical simulations."""

import importlib

__version__ = "0.3.0"

_PUBLIC = {"load_encoder": "probing.sharing", "load_probe": "probing.sharing", "save_pretrained": "probing.sharing", "compare": "results.own_flows", "compare_predictions": "results.comparison", "get_preset": "training.presets", "get_system": "physics.systems", "simulate": "probing.shortcuts", "read": "data.flows", "pretrain": "probing.shortcuts", "fit": "probing.shortcuts"}


def __getattr__(name):  # modules are imported when they are asked for: `import physrep` costs nothing
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_PUBLIC)}, and its submodules")


def __dir__():
    return [*_PUBLIC, "__version__"]
