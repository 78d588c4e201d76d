"""Opacus takes no model with our batch norms for private; by a stand-in that looks up classes as it does, and by it."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.libraries import images
from torch import nn

import bn_ext
from bn_ext import _opacus

REGISTRY = """
class ModuleValidator:
    VALIDATORS, FIXERS = {}, {}

    @classmethod
    def is_valid(cls, model):
        found = [cls.VALIDATORS[type(m)](m) for m in model.modules() if type(m) in cls.VALIDATORS]
        return not sum(found, [])

    @classmethod
    def fix(cls, model):
        for name, module in list(model.named_children()):
            if type(module) in cls.FIXERS:
                model._modules[name] = cls.FIXERS[type(module)](module)
        return model


def register_module_validator(classes):
    return lambda function: ModuleValidator.VALIDATORS.update(dict.fromkeys(classes, function))


def register_module_fixer(classes):
    return lambda function: ModuleValidator.FIXERS.update(dict.fromkeys(classes, function))
"""
BATCH_NORM = """
from torch import nn
KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
register_module_validator(KINDS)(lambda module: ["mixes samples"])
register_module_fixer(KINDS)(lambda module: nn.GroupNorm(1, module.num_features))
"""


def network(how: str, **options: Any) -> Any:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **options), nn.ReLU(), nn.Flatten()).double()
    return {"stock": lambda model: model, "converted": bn_ext.convert, "fused": bn_ext.fuse}[how](model)


@pytest.fixture
def without_opacus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No Opacus is loaded; a folder that is searched first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        del sys.modules[name]


def install(folder: Path, **files: str) -> None:
    (folder / "opacus").mkdir()
    for name, text in files.items():
        (folder / "opacus" / f"{name}.py").write_text(text)
    importlib.invalidate_caches()


def check(validator: Any) -> None:
    """It refuses and fixes ours as it does torch.nn's, and refuses to lose an activation."""
    for how in ("stock", "converted", "fused"):
        for tracked in (True, False):
            model = network(how, track_running_stats=tracked)
            assert not validator.is_valid(model)
            fixed = validator.fix(model)
            assert validator.is_valid(fixed)
            kinds = [type(m) for m in fixed.modules()]
            assert nn.GroupNorm in kinds
            assert not {nn.BatchNorm2d, bn_ext.BatchNorm2d} & set(kinds)
            stock = bn_ext.revert(copy.deepcopy(fixed))
            torch.testing.assert_close(fixed.double()(images()), stock.double()(images()))
    active = nn.Sequential(bn_ext.BatchNorm2d(3, activation="relu"))
    assert not validator.is_valid(active)
    with pytest.raises(RuntimeError, match=r"^ModuleValidator\.fix would lose the activation inside BatchNorm2d"):
        validator.fix(active)
    assert type(active[0]) is bn_ext.BatchNorm2d


@pytest.mark.parametrize("first", ["bn_ext", "opacus"])
def test_registered_whichever_is_imported_first(without_opacus: Path, first: str) -> None:
    install(without_opacus, __init__="from opacus import validators", validators=REGISTRY + BATCH_NORM)
    if first == "opacus":
        sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _opacus._AfterImport)]
        importlib.import_module("opacus")
        _opacus.register_when_imported()
    check(importlib.import_module("opacus.validators").ModuleValidator)


def test_an_opacus_that_has_no_registry_gives_a_warning(without_opacus: Path) -> None:
    install(without_opacus, __init__="version = '0'", validators="")
    with pytest.warns(UserWarning, match=r"could not register.*call bn_ext\.revert\(model\) before ModuleValidator"):
        opacus = importlib.import_module("opacus")
    assert opacus.version == "0"


def test_an_import_that_fails_registers_at_the_next(without_opacus: Path) -> None:
    install(without_opacus, __init__="raise ZeroDivisionError", validators=REGISTRY + BATCH_NORM)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("opacus")
    (without_opacus / "opacus" / "__init__.py").write_text("from opacus import validators  # now it works")
    importlib.invalidate_caches()
    check(importlib.import_module("opacus.validators").ModuleValidator)


def test_absent_is_absent(without_opacus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(without_opacus)])
    with pytest.raises(ModuleNotFoundError, match="opacus"):
        importlib.import_module("opacus")


@pytest.mark.parametrize("how", ["converted", "fused"])
@pytest.mark.parametrize("tracked", [True, False])
def test_opacus_itself(how: str, tracked: bool) -> None:
    opacus = pytest.importorskip("opacus")
    check(opacus.validators.ModuleValidator)
    model = network(how, track_running_stats=tracked)
    data = torch.utils.data.DataLoader([(x, 0) for x in images()], batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer, "data_loader": data, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm cannot support"):
        opacus.PrivacyEngine().make_private(module=model, **options)
