"""scripts/networks_check.py: it counts what is fused, and refuses what differs by more than roundings."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bn_ext

SCRIPT = Path(__file__).parent.parent / "scripts" / "networks_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("networks_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "networks_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZE", 8)
    return module


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.BatchNorm2d(4))


def test_fused_network_passes(script: Any) -> None:
    row = script.check("package", "network", network)
    assert (row.norms, row.converted, row.fused) == (2, 2, 1)
    assert row.is_close()
    page = script.markdown([row], {"torch": "1"})
    assert page.splitlines()[-1].startswith("| package: network | 2 | 2 | 1 | ")


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_network_that_differs_is_refused(script: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 1e-12, in a weight or in the state alone."""
    fuse = bn_ext.fuse

    def wrong(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            getattr(model[1], name).mul_(1 + 1e-12)
        return fuse(model, **options)

    monkeypatch.setattr(bn_ext, "fuse", wrong)
    assert not script.check("package", "network", network).is_close()


def test_package_that_is_missing_is_left_out(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PACKAGES", {"no-such-package": script.of_timm})
    monkeypatch.setattr(sys, "argv", ["networks_check.py"])
    script.main()
    assert capsys.readouterr().out == "no-such-package is not installed: its networks are skipped\n"
