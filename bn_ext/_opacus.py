"""Registers Opacus' validator and fixer of torch.nn's batch norms for ours; Opacus looks up exact classes."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from bn_ext._eps import lost_activation
from bn_ext.convert import _STOCK
from bn_ext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def register_when_imported() -> None:
    """Register with Opacus now if it is imported, otherwise when it is; bn_ext never imports it."""
    if "opacus" in sys.modules:
        _register()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_own(finder)]  # bn_ext may be reloaded
    sys.meta_path.insert(0, _AfterImport())


def _is_own(finder: object) -> bool:
    return type(finder).__qualname__ == "_AfterImport" and type(finder).__module__ == __name__


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds Opacus through the other finders, and registers with it after its code has run."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "opacus":
            return None
        found = (f.find_spec(fullname, path, target) for f in sys.meta_path if not _is_own(f))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        validators: Any = importlib.import_module("opacus.validators")
        registry = validators.ModuleValidator
        register_validator, register_fixer = validators.register_module_validator, validators.register_module_fixer
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"bn_ext could not register its batch norms with Opacus ({error}), which therefore accepts them: call "
            "bn_ext.revert(model) before ModuleValidator and make_private",
            stacklevel=2,
        )
        return

    def validate(module: Any, **kwargs: Any) -> Any:
        return registry.VALIDATORS[_STOCK[type(module)]](module, **kwargs)

    def fix(module: Any, **kwargs: Any) -> Any:
        if module.activation is not None:
            raise lost_activation("ModuleValidator.fix", module)
        return registry.FIXERS[_STOCK[type(module)]](module, **kwargs)

    register_validator(_OURS)(validate)
    register_fixer(_OURS)(fix)
