"""Where numbers come from: the chip, and the commit, date, versions and how threads wait."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.others import OTHERS
from benchmarks.providers import PEERS, installed_version
from benchmarks.results import RESULTS, Result

CPUINFO = Path("/proc/cpuinfo")
# A model name of these words alone, as a hypervisor may give, says nothing of the chip.
VAGUE = {"amd", "epyc", "ryzen", "intel", "xeon", "core"}
# AMD's family, models and core, as the Linux kernel tells them apart (arch/x86/kernel/cpu/amd.c).
ZEN = (
    (23, (*range(0x30), *range(0x50, 0x60)), "Zen"),
    (23, (*range(0x30, 0x50), *range(0x60, 0xB0)), "Zen 2"),
    (25, (*range(0x10), *range(0x20, 0x60)), "Zen 3"),
    (25, (*range(0x10, 0x20), *range(0x60, 0xB0)), "Zen 4"),
    (26, (*range(0x30), *range(0x40, 0x50), *range(0x60, 0x80)), "Zen 5"),
)


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


def origin() -> Result:
    """The commit, the date, the versions and OpenMP's wait policy that a workload is measured with."""
    peers = *PEERS, *(peer for other in OTHERS.values() for peer in other.peers)
    packages = dict.fromkeys(("triton", *(provider.package for provider in peers if provider.package)))
    installed = {package: installed_version(package) for package in packages}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    versions |= {package: found for package, found in installed.items() if found is not None}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    policy = os.environ.get("OMP_WAIT_POLICY", "unset").lower()
    date = time.strftime("%Y-%m-%d")
    return {"commit": commit or "unknown", "date": date, "versions": versions, "wait_policy": policy}


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
    numbers = f"family {family}, model {model}"
    cores = [core for known, models, core in ZEN if vendor == "AuthenticAMD" and family == known and model in models]
    return f"{name or vendor} ({cores[0] if cores else numbers})"


def default_output(machine: Result) -> Path:
    """Where a chip's results are kept: results/nvidia-h200.json; a CPU's with the number of threads."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / (f"{name}-{machine['threads']}t.json" if machine["type"] == "cpu" else f"{name}.json")
