"""The environment that `make` builds: when it is made anew, and with which torch."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_env.py"


def test_a_torch_that_was_named_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make lint` after `make test TORCH=...` does not bring another torch, even where the project has changed."""
    spec = importlib.util.spec_from_file_location("make_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: list[str] = []

    def make(folder: Path, torch: str) -> Path:
        made.append(torch)
        return folder

    monkeypatch.setattr(module, "make", make)
    monkeypatch.setattr(module, "run", lambda *command: None)

    def call(*options: str) -> list[str]:
        made.clear()
        monkeypatch.setattr(sys, "argv", ["make_env.py", "--folder", str(tmp_path), *options])
        module.main()
        return list(made)

    assert call() == [""]  # whichever torch can be imported
    assert call() == []
    assert call("--torch", "torch==2.13.0") == ["torch==2.13.0"]
    assert call() == []
    assert call("--torch", "torch==2.13.0") == []
    note = tmp_path / "made_for.txt"
    note.write_text(note.read_text() + "# changed\n")
    assert call() == ["torch==2.13.0"]
    assert call("--torch", "torch==2.11.0") == ["torch==2.11.0"]
