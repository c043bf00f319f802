"""Where numbers come from: the chip, and the commit, date and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.providers import PEERS, installed_version
from benchmarks.results import RESULTS, Result

CPUINFO = Path("/proc/cpuinfo")
# A model name of these words alone, as a hypervisor may give, says nothing of the chip.
VAGUE = {"amd", "epyc", "ryzen", "intel", "xeon", "core"}


def machine(device: str) -> Result:
    """What does not change from run to run of one machine."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    memory = gpu.total_memory if gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "type": device,
        "device": gpu.name if gpu else cpu_name(CPUINFO.read_text() if CPUINFO.exists() else ""),
        "memory_gib": round(memory / 2**30, 1),
        "threads": torch.get_num_threads(),
    }


def origin() -> dict[str, Any]:
    """The commit, the date and the versions that a workload is measured with."""
    packages = ("triton", *(provider.package for provider in PEERS if provider.package))
    installed = {package: installed_version(package) for package in packages}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    versions |= {package: version for package, version in installed.items() if version is not None}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit or "unknown", "date": time.strftime("%Y-%m-%d"), "versions": versions}


def cpu_name(cpuinfo: str) -> str:
    """A chip's name from /proc/cpuinfo: its model name, and its generation or numbers where that says nothing."""
    fields = dict(re.findall(r"^(\w[\w ]*\w)\s*:[ \t]*(.*)$", cpuinfo.partition("\n\n")[0], re.MULTILINE))
    name = re.sub(r"\((R|TM)\)|\b\d+-Core\b|\bProcessor\b|\bCPU\b|@.*", " ", fields.get("model name", ""), flags=re.I)
    name = " ".join(name.split())
    if set(name.lower().split()) - VAGUE:
        return name
    if "CPU part" in fields:
        return f"Arm (implementer {fields['CPU implementer']}, part {fields['CPU part']})"
    if "cpu family" not in fields:
        return platform.processor() or platform.machine()
    vendor, family, model = fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
    generation = _zen(family, model) if vendor == "AuthenticAMD" else None
    return f"{name or vendor} ({generation or f'family {family}, model {model}'})"


def _zen(family: int, model: int) -> str | None:
    """The core of an AMD chip, as the Linux kernel tells them apart (arch/x86/kernel/cpu/amd.c)."""
    if family == 23:
        return "Zen" if model < 0x30 else "Zen 2"
    if family == 25:
        return "Zen 3" if model < 0x10 or 0x20 <= model < 0x60 else "Zen 4"
    if family == 26 and (model < 0x30 or 0x40 <= model < 0x50 or 0x60 <= model < 0x80):
        return "Zen 5"
    return None


def default_output(machine: Result) -> Path:
    """Where a chip's results are kept: results/nvidia-h200.json; a CPU's with the number of threads."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / (f"{name}-{machine['threads']}t.json" if machine["type"] == "cpu" else f"{name}.json")
