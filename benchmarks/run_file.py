"""The JSON of a run of whole models: written anew after every group, so that a run can be broken off and taken up."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from .report import ReportError, read

MEND = "--fresh replaces it, --json writes elsewhere"
ROOT = Path(__file__).resolve().parent.parent


class Group(NamedTuple):
    """What is timed together: a model's variants, in turns."""

    model: str
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.layout}"


class OtherRunError(Exception):
    """The file holds a run that this one cannot go on with."""


def digest() -> str:
    """Name the sources that the figures depend on, those of the package, by a few hexadecimal digits."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()] + list((ROOT / "bn_ext").glob("*.py"))
    together = hashlib.sha256()
    for path in sorted(files):
        if path.name != "_build_config.py":
            together.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return together.hexdigest()[:12]


class RunFile:
    """A run's JSON: what it was made on, the groups that are done, and those that are not, with the reason."""

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool):
        self.path, self.about = path, about
        self.groups: list[dict[str, Any]] = []
        if path.exists() and not fresh:
            self._take_up()

    def _take_up(self) -> None:
        try:
            run = read(self.path)
            before, self.groups = dict(run["run"]), list(run["groups"])
            list(map(group_of, self.groups))
        except (KeyError, TypeError, ValueError, ReportError) as error:
            raise OtherRunError(f"{self.path} is not a run that can be gone on with ({error!r}): {MEND}") from error
        differ = [key for key in (before | self.about) if key != "date" and before.get(key) != self.about.get(key)]
        if differ:
            words = "; ".join(f"{key} {before.get(key)} there, {self.about.get(key)} here" for key in differ)
            raise OtherRunError(f"{self.path} holds a run of something else ({words}): {MEND}")
        self.about = before

    def has(self, group: Group) -> bool:
        """Tell whether this group is done."""
        return any(group_of(done) == group for done in self.groups)

    def write(self, left_out: dict[Group, str]) -> None:
        """Write what there is, and what there is not."""
        missing = [group._asdict() | {"reason": reason} for group, reason in left_out.items()]
        write_json(self.path, {"run": self.about, "groups": self.groups, "left_out": missing})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once, so that it is whole whenever the run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def group_of(found: dict[str, Any]) -> Group:
    """Name the group that an entry of the JSON is of."""
    return Group(found["model"], found["dtype"], found["layout"])
