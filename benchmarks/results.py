"""The files under results/, one for each chip: every workload with its own commit, date and versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results"
FIELDS = ("kind", "rows", "features", "dtype")
Result = dict[str, Any]


class Key(NamedTuple):
    """Whose result it is: a provider's, an operation's or a training step's; ``backend`` is one of this library."""

    name: str
    backend: str = ""

    @property
    def ours(self) -> bool:
        """It is this library's loss."""
        return self.name == "ours"

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})" if self.backend else self.name


PLAIN, COMPILED, OPEN_CLIP = Key("plain"), Key("plain, torch.compile"), Key("open_clip ClipLoss")
FLOOR = Key("floor")


def floor_of(operation: str) -> Key:
    """An operation's own floor."""
    return Key(operation, FLOOR.name)


def fields_of(workload: Workload) -> Result:
    """A workload's fields as they are stored."""
    return {name: getattr(workload, name) for name in FIELDS}


def workload_of(case: Result) -> Workload:
    """What a stored case measured."""
    return Workload(*(case[name] for name in FIELDS))


def write(content: bytes, path: Path) -> None:
    """Write a whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def load(path: Path) -> Result:
    """A file's machine, workloads (their results by Key) and what was left out."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["machine"]["device"], stored["machine"]["threads"]
        stored["left_out"] = dict(stored["left_out"])
        for case in stored["workloads"]:
            case["commit"], case["date"], case["versions"]
            case["results"] = {Key(row.pop("name"), row.pop("backend", "")): row for row in case["results"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds no results of this version of the benchmarks") from None
    return stored


def save(stored: Result, path: Path) -> None:
    """Write what :func:`load` reads."""
    cases = []
    for case in stored["workloads"]:
        named = [({k: v for k, v in key._asdict().items() if v}, row) for key, row in case["results"].items()]
        cases.append({**case, "results": [name | row for name, row in named]})
    write((json.dumps({**stored, "workloads": cases}, indent=1) + "\n").encode(), path)


def same_machine(one: Result, other: Result) -> bool:
    """Two files' times may be compared, and stand in one file."""
    mine, theirs = one["machine"], other["machine"]
    return mine["device"] == theirs["device"] and (mine["type"] == "cuda" or mine["threads"] == theirs["threads"])


def merge(kept: Result, run: Result) -> Result:
    """A file's results with a run's in the place of the same workloads' and behind them."""
    cases = {workload_of(case): case for case in (*kept["workloads"], *run["workloads"])}
    measured = {str(workload) for workload in cases}
    left_out = {what: why for what, why in {**kept["left_out"], **run["left_out"]}.items() if what not in measured}
    return {**run, "workloads": list(cases.values()), "left_out": left_out}
