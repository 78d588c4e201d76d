"""Loads the extension module, or states why it cannot be loaded."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _release(version: str) -> tuple[str, ...]:
    """Major and minor number; torch keeps its C++ interfaces stable within a minor release."""
    return tuple(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    """The extension and an empty string, or None and the reason."""
    try:
        config: Any = importlib.import_module("bn_ext._build_config")
    except ImportError:
        return None, (
            f"bn_ext has not been built in {Path(__file__).parent}: if it is installed elsewhere, change to another "
            "folder; otherwise run `pip install --no-build-isolation .` in the source folder (docs/install.md)"
        )
    if _release(config.TORCH) != _release(torch.__version__):
        return None, (
            f"bn_ext was built against torch {config.TORCH}, but this is torch {torch.__version__}: rebuild it "
            "with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"
        )
    try:
        return importlib.import_module("bn_ext._C"), ""
    except ImportError as error:
        return None, (
            f"bn_ext's extension module cannot be loaded ({error}): rebuild it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"
        )


module, reason = _load()
