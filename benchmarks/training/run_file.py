"""The JSON of a run of whole models: written anew after every group, so that a run can be broken off and taken up."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..cells import FileError, read_json, unfinished, write

MEND = "leave --resume away to measure anew"


class Group(NamedTuple):
    """What is timed together: a model's variants, in turns."""

    model: str
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.layout}"


class OtherRunError(Exception):
    """The file holds a run that this one cannot go on with."""


class RunFile:
    """A run's JSON: what it was made on, the groups that are done, and those that are not, with the reason."""

    def __init__(self, path: Path, about: dict[str, Any], resume: bool):
        self.path, self.about = path, about
        self.groups: list[dict[str, Any]] = []
        earlier = next((name for name in (unfinished(path), path) if resume and name.exists()), None)
        if earlier is not None:
            self._take_up(earlier)

    def _take_up(self, path: Path) -> None:
        try:
            run = read_json(path)
            before, self.groups = dict(run["run"]), list(run["groups"])
            list(map(group_of, self.groups))
        except (KeyError, TypeError, ValueError, FileError) as error:
            raise OtherRunError(f"{path} is not a run that can be gone on with ({error!r}): {MEND}") from error
        differ = [key for key in (before | self.about) if key != "date" and before.get(key) != self.about.get(key)]
        if differ:
            words = "; ".join(f"{key} {before.get(key)} there, {self.about.get(key)} here" for key in differ)
            raise OtherRunError(f"{path} holds a run of something else ({words}): {MEND}")
        self.about = before

    def has(self, group: Group) -> bool:
        """Tell whether this group is done."""
        return any(group_of(done) == group for done in self.groups)

    def write(self, left_out: dict[Group, str]) -> None:
        """Write what there is, and what there is not."""
        missing = [group._asdict() | {"reason": reason} for group, reason in left_out.items()]
        write_json(unfinished(self.path), {"run": self.about, "groups": self.groups, "left_out": missing})

    def end(self) -> None:
        """Put the file in its place, where an earlier run's has stayed until now."""
        os.replace(unfinished(self.path), self.path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file at once."""
    write(path, json.dumps(content, indent=1) + "\n")


def group_of(found: dict[str, Any]) -> Group:
    """Name the group that an entry of the JSON is of."""
    return Group(found["model"], found["dtype"], found["layout"])
