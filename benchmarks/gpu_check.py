"""The first half hour on a GPU: `make gpu-check PART=1|2|3 OUT=...`, three commands of at most eight minutes each.

Every step is a process of its own under `timeout`, so that none that fails, hangs or breaks the GPU's context stops the
next. OUT gets gpu-check.json (each step's status, seconds and numbers) and gpu-check.log; a step that has its result
there, of the GPU that is here, is not run again. Nothing but the standard library is imported: what is checked cannot
break the check. It stands beside the benchmarks because most of its steps are some of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_build import kept
from benchmarks.results import write

ROOT = Path(__file__).resolve().parent.parent
PART_SECONDS = 480
BACKENDS = ("native", "triton")
# Values of MODEST_ALIGN_EXPERIMENT, and the backend whose kernels each changes: a new one is a word here. Native's are
# builds of their own.
EXPERIMENTS = {"native": ("pingpong64", "pingpong128", "stagger"), "triton": ("triton-persistent",)}
WORKSPACES_MIB = ("128", "512")  # beside 256, which is the default
# Parts of our kernels' names: PyTorch's own are not instrumented.
KERNELS = ("matmul_kernel", "contrastive_", "grads_kernel", "perturb_normalize", "merge_kernel")
KERNELS += ("factors_kernel", "bounds_kernel", "pair_losses", "sums_kernel")
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
BEHAVIOUR = "repeat or no_host_sync or graph_capture"
LARGE = "2_31 or 65536 or half_a_million"
PEERS = ("(triton)", "(eager)", "plain", "open_clip", "sentence", "linear_cross", "memeff", "Inf-CL", "siglip")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: its key in the JSON.
        seconds: it is killed after so many.
        command: {out} is OUT's place, {result} a file for JSON that the step's record gets.
        env: environment variables beside those that are set.
        switches: variables that a build may not know: it is then left out.
        needs: a program without which it is left out.
        extension: the experiment whose build, if OUT has it, the command's module runs on.
        gates: its failure is the whole command's.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    extension: str = ""
    gates: bool = True


def steps_of(part: int, dry: bool = False) -> list[Step]:
    """A part's steps, most telling first; with ``dry`` as they run without a GPU: tiny, and tests only collected."""
    python = (sys.executable, "-m")
    builder = (*python, "benchmarks.gpu_build", "{out}")
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}

    def measure(name: str, seconds: int, *args: str, extension: str = "", **fields: Any) -> Step:
        run = ("benchmarks.gpu_measurements", *args, *(["--tiny"] if dry else []), "--result", "{result}")
        command = (*builder, "--with", extension, *run) if extension else (*python, *run)
        return Step(name, seconds, command, env=interpreted, extension=extension, **fields)

    def tests(*args: str) -> tuple[str, ...]:
        # A test that hangs shows its stack before the step is killed.
        command = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=15", *args)
        return (*command, "--collect-only", "-p", "benchmarks.fake_gpu") if dry else command

    def gpu_tests(selection: str) -> tuple[str, ...]:
        return tests("-m", "gpu", "tests/test_gpu.py", "-k", selection)

    def sanitize(tool: str, backend: str, seconds: int) -> Step:
        options = f"--tool {tool} --error-exitcode 1 --report-api-errors no".split()
        for kernel in KERNELS:
            options += ["--kernel-name", f"kns={kernel}"]
        cases = "257 or odd-sizes or groups-and-extra-negatives or wide"
        command = gpu_tests(f"(error_budget or real_tiles) and {backend} and torch.float16 and ({cases})")
        return Step(
            f"{tool}-{backend}",
            seconds,
            command if dry else ("compute-sanitizer", *options, *command),
            # One allocation a tensor: in the cache's large ones an access past a tensor's end is none.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs="" if dry else "compute-sanitizer",
            gates=tool == "memcheck",
        )

    def benchmark(name: str, seconds: int, args: str, output: str, *providers: str) -> Step:
        if dry:
            args = f"{args.split(' --dtypes')[0]} --rows 32 --features 16 --dtypes float32 --rounds 1"
        return Step(
            name, seconds, (*python, "benchmarks", *args.split(), "--output", output, "--providers", *providers)
        )

    machine = Step("machine", 10, ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"), needs="nvidia-smi")
    build = Step("build", 60, builder, gates=False)
    if part == 1:
        return [
            machine,
            measure("ceilings", 25, "ceilings"),
            build,
            *(
                Step(f"budgets-{each}", seconds, gpu_tests(f"{each} and not ({BEHAVIOUR} or {LARGE})"))
                for each, seconds in zip(BACKENDS, (50, 65), strict=True)
            ),
            *(Step(f"behaviour-{each}", 25, gpu_tests(f"{each} and ({BEHAVIOUR})")) for each in BACKENDS),
            *(Step(f"large-{each}", 25, gpu_tests(f"{each} and ({LARGE})")) for each in BACKENDS),
            *(measure(f"operations-{each}", 30, "operations", "--backend", each) for each in BACKENDS),
            Step("others", 40, gpu_tests(f"not ({' or '.join(BACKENDS)})")),
            Step("triton-tiles", 30, tests("-m", "gpu or not slow", "tests/test_triton.py")),
            Step("machine-code", 10, tests("tests/test_cuda_compile.py"), gates=False),
        ]
    if part == 2:
        experiments = [(each, value) for each in BACKENDS for value in EXPERIMENTS[each]]
        workspaces = [(each, mib) for mib in WORKSPACES_MIB for each in BACKENDS]

        def compare(backend: str, variable: str, value: str) -> Step:
            extension = value if backend == "native" and variable == "MODEST_ALIGN_EXPERIMENT" else ""
            args = f"{backend}-with-{value}", 20, "operations", "--backend", backend
            return measure(*args, extension=extension, switches={variable: value})

        return [
            machine,
            Step("builds", 80, (*builder, *EXPERIMENTS["native"]), gates=False),
            measure("addmm", 30, "addmm"),
            *(measure(f"as-it-is-{each}", 20, "operations", "--backend", each) for each in BACKENDS),
            *(compare(each, "MODEST_ALIGN_EXPERIMENT", value) for each, value in experiments),
            *(compare(each, "MODEST_ALIGN_WORKSPACE_MIB", mib) for each, mib in workspaces),
            *(measure(f"host-{each}", 20, "host", "--backend", each) for each in BACKENDS),
            *(measure(f"clocks-{each}", 25, "clocks", "--backend", each) for each in BACKENDS),
            *(measure(f"profile-{each}", 35, "profile", "--backend", each, gates=False) for each in BACKENDS),
        ]
    losses = "--only loss --dtypes bfloat16 --budget 80"
    return [
        machine,
        build,
        *(sanitize("memcheck", each, 55) for each in BACKENDS),
        *(sanitize("racecheck", each, 35) for each in BACKENDS),
        # Native, whose failure would take the peers' numbers along, has rounds with Triton after them.
        benchmark("losses", 120, losses, "{out}", *(("(eager)", "open_clip") if dry else PEERS)),
        measure("versus", 30, "versus"),
        benchmark("step-triton", 20, "--only step", "{out}", "(triton)"),
        benchmark("step-native", 20, "--only step", "{result}", "(native)"),
        *(measure(f"groups-{each}", 20, "groups", "--backend", each) for each in BACKENDS),
    ]


@cache
def _sources() -> str:
    files = [*(ROOT / "modest_align_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def why_left_out(step: Step, out: Path) -> str | None:
    """What a step needs and is not here, or None: a program, a build, or a switch that is nowhere in the sources."""
    if step.needs and shutil.which(step.needs) is None:
        return f"{step.needs} is not on the PATH"
    for name, value in step.switches.items():
        for word in (name, value) if name == "MODEST_ALIGN_EXPERIMENT" else (name,):
            if f'"{word}"' not in _sources():
                return f"this build knows no {word}"
    if step.extension and not kept(out, step.extension).exists():
        return f"there is no build of {step.extension} in {out}"
    return None


def run_step(step: Step, out: Path, gpu: str) -> dict[str, Any]:
    """Run a step, or say why not: its record."""
    record = {"status": "left out", "seconds": 0.0, "allowed": step.seconds, "gpu": gpu, "gates": step.gates}
    reason = why_left_out(step, out)
    if reason is not None:
        return {**record, "last": reason}
    with tempfile.TemporaryDirectory() as folder, (out / "gpu-check.log").open("ab+") as log:
        result = Path(folder) / "result.json"
        command = [word.replace("{out}", str(out)).replace("{result}", str(result)) for word in step.command]
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.env, **step.switches}
        settings = "".join(f"{name}={value} " for name, value in {**step.env, **step.switches}.items())
        log.write(f"\n== {step.name}: {settings}{shlex.join(command)}\n".encode())
        log.flush()
        began, start = log.tell(), time.monotonic()
        # KILL, to the whole group: a process that waits for a kernel that hangs hears nothing else.
        limited = ["timeout", "--signal=KILL", str(step.seconds), *command]
        done = subprocess.run(limited, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        seconds = time.monotonic() - start
        log.seek(began)
        lines = log.read().decode(errors="replace").split("\n")
        status = "failed" if done.returncode else "ok"
        if done.returncode and seconds >= step.seconds - 0.1:
            status = "timed out"
        record |= {"status": status, "seconds": round(seconds, 1), "exit": done.returncode, "command": command}
        record["last"] = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if result.exists():
            record["result"] = json.loads(result.read_text(encoding="utf-8"))
    return record


def run(steps: list[Step], out: Path, gpu: str, again: tuple[str, ...] = ()) -> bool:
    """Run what has no record of ``gpu`` yet or is asked for again; whether everything that gates passed.

    Args:
        steps: in their order.
        out: a folder, made if it is not there.
        gpu: the GPU's name.
        again: names of steps, "failed" or "all".
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu-check.json"
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for step in steps:
        kept = records.get(step.name)
        asked = {"all", step.name} & set(again) or ("failed" in again and kept and kept["status"] != "ok")
        done = kept and kept["gpu"] == gpu and kept["status"] != "left out"
        # Whether the extension is in place is of this checkout, not of OUT.
        if done and not asked and not step.name.startswith("build"):
            continue
        print(f"{step.name} ...", flush=True)
        records[step.name] = run_step(step, out, gpu)
        write((json.dumps(records, indent=1) + "\n").encode(), file)
    print()
    mine = [(step.name, records[step.name]) for step in steps]
    for name, record in mine:
        times = f"{record['seconds']:5.1f} of {record['allowed']:3d} s"
        print(f"{record['status']:9}  {times}  {name:26}  {record['last'][:100]}")
    print(f"\n{sum(record['seconds'] for _, record in mine):.0f} s; all of it is in {file} and {out / 'gpu-check.log'}")
    return all(record["status"] in ("ok", "left out") or not record["gates"] for _, record in mine)


def gpu_name() -> str | None:
    """The name of the GPU that is here, or None."""
    query = ["timeout", "20", "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main(args: list[str] | None = None) -> int:
    """Run the parts that are asked for: 0, or 1 if something that gates failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split(":")[0])
    parser.add_argument("parts", type=int, nargs="+", choices=(1, 2, 3), help="correctness, tuning data, results")
    parser.add_argument("--out", type=Path, required=True, help="a folder, also of an earlier run that goes on")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="STEP", help='though it has a result; "failed", "all"'
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: tiny, and tests only collected")
    options = parser.parse_args(args)
    gpu = "dry run" if options.dry_run else gpu_name()
    if gpu is None:
        print("no GPU: nvidia-smi names none, and --dry-run is what needs none", file=sys.stderr)
        return 2
    steps = {step.name: step for part in options.parts for step in steps_of(part, options.dry_run)}
    return 0 if run(list(steps.values()), options.out.resolve(), gpu, tuple(options.again)) else 1


if __name__ == "__main__":
    sys.exit(main())
