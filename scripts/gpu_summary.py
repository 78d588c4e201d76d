"""For gpu_check.sh: write summary.json from the list of its steps; exit with 1 unless all passed or were skipped."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

END = "end"  # the last line of the list if the script ran to its end


def commit(sources: Path) -> str:
    """Return the commit of the sources, marked dirty if they have changes; empty if there is no git."""
    command = ["git", "-C", str(sources), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def tests(report: Path) -> dict[str, Any]:
    """Count the tests in pytest's XML that ran, failed and were skipped, and the reasons for skipping."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except ElementTree.ParseError as error:  # pytest was ended while it was writing
        return {"error": f"{report.name} cannot be read: {error}"}
    skipped = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("failure") is not None]
    failed += [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("error") is not None]
    reasons = dict(Counter(skipped).most_common())
    return {"ran": len(cases) - len(skipped), "failed": failed, "skipped": len(skipped), "reasons": reasons}


def read_steps(lines: list[str]) -> list[dict[str, Any]]:
    """Read the list, which has a tab-separated line per step."""
    steps = []
    for line in lines:
        name, result, status, seconds, command = line.split("\t")
        code = int(status) if status else None
        steps.append({"name": name, "result": result, "status": code, "seconds": int(seconds), "command": command})
    return steps


def main(steps_file: str, sources: str, folder: str, state: str, machine: str) -> int:
    """Write the summary and print its path; the last two arguments are lines printed by gpu_probe.py."""
    lines = Path(steps_file).read_text().splitlines()
    complete = lines[-1:] == [END]
    steps = read_steps(lines[: len(lines) - complete])
    passed = complete and all(step["result"].startswith(("passed", "skipped: ")) for step in steps)
    passed = passed and steps[0]["result"] == "passed"
    summary: dict[str, Any] = {"passed": passed, "complete": complete}
    summary |= {"commit": commit(Path(sources)), "sources": state, **json.loads(machine)}
    reports = {step["name"]: Path(folder) / f"{step['name']}.xml" for step in steps}
    summary["tests"] = {name: tests(report) for name, report in reports.items() if report.exists()}
    summary |= {"seconds": sum(step["seconds"] for step in steps), "steps": steps}
    path = Path(folder) / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{'passed' if passed else 'FAILED'}: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
