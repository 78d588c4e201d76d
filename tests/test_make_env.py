"""The environment that `make` builds: when it is made anew, with which torch and kernels, and what is seen of it."""

import importlib.util
import os
import queue
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

VERSIONS = """torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.9.0+cpu, 2.12.0+cu130
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine without a GPU."""
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("BN_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    module = load("make_env")
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    return module


@pytest.fixture
def script(make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Script":
    return Script(make_env, monkeypatch, tmp_path)


class Script:
    """Calls of make_env.py that note what they would do."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.module, self.monkeypatch, self.folder = module, monkeypatch, folder
        self.done: list[object] = []

        def make(folder: Path, torch: str) -> dict[str, str]:
            self.done.append(("make", torch))
            return dict(module.build_settings(folder))

        monkeypatch.setattr(module, "make", make)
        monkeypatch.setattr(module, "run", lambda steps, words, *command, **environment: self.done.append(words))

    def __call__(self, *options: str) -> list[object]:
        self.done.clear()
        self.monkeypatch.setattr(sys, "argv", ["make_env.py", "--folder", str(self.folder), *options])
        self.module.main()
        return list(self.done)


def test_a_torch_that_was_named_stays(script: Script) -> None:
    """`make lint` after `make test TORCH=...` does not bring another torch, even where the project has changed."""
    made = ["python -m bn_ext", "install the requirements of test and demo and lint"]
    assert script() == [("make", ""), *made]  # whichever torch can be imported
    assert script() == []
    assert script("--torch", "torch==2.13.0") == [("make", "torch==2.13.0"), *made]
    assert script() == []
    assert script("--torch", "torch==2.13.0") == []
    note = script.folder / "made_for.json"
    note.write_text(note.read_text().replace("setuptools", "setuptools "))
    assert script() == [("make", "torch==2.13.0"), *made]
    assert script("--torch", "torch==2.11.0") == [("make", "torch==2.11.0"), *made]
    note.write_text(note.read_text()[:20])  # the disk was full
    assert script() == [("make", ""), *made]


def test_what_make_did_not_make_stays(make_env: ModuleType, tmp_path: Path) -> None:
    """The folder that VENV names may be somebody's own."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("words")
    (own / "made_of_words.txt").touch()  # not the name of a mark
    for folder in (own, own / "thesis.txt"):
        with pytest.raises(SystemExit, match=r"was not made by make: remove it, or set VENV to another folder"):
            make_env.clear(folder)
    assert (own / "thesis.txt").read_text() == "words"
    (own / make_env.MARKER).touch()  # as in an environment whose making was interrupted
    make_env.clear(own)
    assert [path.name for path in own.iterdir()] == [make_env.MARKER]


def test_a_source_that_looks_old_is_noticed(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file that is renamed, or copied with its time, is older than the build."""
    root = tmp_path_factory.mktemp("sources")
    source, old = root / "csrc" / "a.cpp", (1e9, 1e9)
    for path in (root / "setup.py", root / "pyproject.toml", source, root / "build" / "temp.x" / "a.o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, old)
    monkeypatch.setattr(script.module, "ROOT", root)
    monkeypatch.setattr(script.module, "requirements_of", lambda *extras: [])
    script()
    assert script() == []
    source.write_text("changed")
    os.utime(source, old)
    assert script() == ["compile bn_ext"]
    assert not (root / "build" / "temp.x").exists()
    assert script() == []
    source.rename(root / "csrc" / "b.cpp")
    assert script() == ["compile bn_ext"]


def test_what_is_needed_later_is_added(script: Script) -> None:
    script("--extras", "demo")
    assert script("--extras", "demo", "test") == ["install the requirements of test"]
    assert script("--extras", "demo", "test") == []


def test_other_kernels_are_compiled_again(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script()
    monkeypatch.setenv("BN_EXT_CUDA", "1")
    assert script() == ["compile bn_ext"]
    assert script() == []


def test_kernels_are_those_that_this_machine_can_run(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_env.build_settings(tmp_path) == {"BN_EXT_CUDA": "0"}
    assert "no GPU here, so the CUDA kernels are not built (BN_EXT_CUDA=1 builds them" in capsys.readouterr().out
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'[[[9, 0], [10, 3]], ["sm_90", "sm_100"]]\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(make_env, "has_gpu", lambda: True)
    assert make_env.build_settings(python) == {"TORCH_CUDA_ARCH_LIST": "9.0;10.0"}
    assert "for this machine's GPU only, 9.0;10.0 (TORCH_CUDA_ARCH_LIST selects others)" in capsys.readouterr().out
    python.write_text('#!/bin/sh\necho \'[[[11, 0]], ["sm_90", "sm_100"]]\'\n')
    assert make_env.build_settings(python) == {}
    assert "no code for a GPU of compute capability 11.0: CUDA kernels are built for 8.0 and" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert make_env.build_settings(python) == {"TORCH_CUDA_ARCH_LIST": "8.0"}


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([(8, 9)], "8.6"), ([(9, 0), (8, 0), (9, 0)], "8.0;9.0"), ([(12, 1)], "12.0"), ([(9, 0), (11, 0)], "")],
)
def test_architectures_are_the_newest_that_gpus_run(
    make_env: ModuleType, gpus: list[tuple[int, int]], expected: str
) -> None:
    listed = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert make_env.architectures(gpus, listed) == expected


def test_without_a_gpu_torch_is_the_newest_cpu_build(
    make_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{VERSIONS}'\n")
    python.chmod(0o755)
    assert make_env.choose_torch(python) == "torch==2.13.0+cpu"
    assert "no GPU here, so torch 2.13.0+cpu, which has no CUDA" in capsys.readouterr().out
    python.write_text("#!/bin/sh\necho 'Available versions: 2.15.0, 2.9.0+cpu'\n")  # that one is too old
    assert make_env.choose_torch(python) == "torch>=2.11"
    assert "TORCH=torch==... installs another torch" in capsys.readouterr().out
    monkeypatch.setattr(make_env, "has_gpu", lambda: True)
    assert make_env.choose_torch(python) == "torch>=2.11"


class Silence:
    """Lines of a command, one after the other; None: nothing comes for as long as the reader waits."""

    def __init__(self, *lines: str | None) -> None:
        self.lines = [*lines]

    def get(self, timeout: float) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if line is None:
            raise queue.Empty
        return line


def test_a_silent_command_gives_signs_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    steps = load("progress").Steps(2)
    lines = ["bn_ext: CUDA kernels: no\n", "[3/9] c++ -c a/b.cpp -o b.o\n"]
    output: list[str] = []
    steps._follow(Silence(lines[0], lines[1], None, None), output)
    assert output == lines
    printed = [line.partition("]   ")[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["bn_ext: CUDA kernels: no", "file 3 of 9, b.cpp", "file 3 of 9, b.cpp"]


def test_the_output_of_a_command_that_fails_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = load("progress").Steps(2)
    assert steps.run("pass", ["sh", "-c", "echo much"], tmp_path, {}) == 0
    assert steps.run("fail", ["sh", "-c", "echo the $REASON; exit 3"], tmp_path, {"REASON": "disk"}) == 3
    output = re.sub(r"\d+:\d\d", "0:00", capsys.readouterr().out)
    assert output == "[step 1 of 2, 0:00] pass\n[step 2 of 2, 0:00] fail\nthe disk\n"
