"""The check on a GPU, tried without one: its time, that nothing stops it, and its measurements, tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_build, gpu_check, gpu_measurements
from benchmarks.gpu_check import Step, steps_of
from benchmarks.providers import all_providers
from modest_align_kernels import available_backends

BACKENDS = [name for name in gpu_check.BACKENDS if available_backends("cpu")[name] is None]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def statuses(out: Path) -> dict[str, str]:
    records = json.loads((out / "gpu-check.json").read_text())
    return {name: record["status"] for name, record in records.items()}


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_fits_its_time_and_keeps_backends_apart(part: int) -> None:
    steps = steps_of(part)
    assert sum(step.seconds for step in steps) <= gpu_check.PART_SECONDS
    assert len({step.name for step in steps}) == len(steps)
    assert [step.name for step in steps] == [step.name for step in steps_of(part, dry=True)]
    for one, other in (gpu_check.BACKENDS, gpu_check.BACKENDS[::-1]):
        for step in steps:
            assert not step.name.endswith(one) or other not in step.command


def test_all_providers_but_native_are_peers() -> None:
    names = [str(provider.key) for provider in all_providers("cpu")]
    left = [name for name in names if not any(peer in name for peer in gpu_check.PEERS)]
    assert left == ["ours (native)"]
    assert all(any(peer in name for name in names) for peer in gpu_check.PEERS)


def test_what_fails_hangs_or_is_missing_stops_nothing(tmp_path: Path, capsys) -> None:
    steps = [
        Step("fails", 10, python("raise ValueError('wrong')")),
        Step("hangs", 1, ("bash", "-c", "trap '' TERM; echo waiting; sleep 60 & sleep 60")),
        Step("crashes", 10, python("import os; os.abort()"), gates=False),
        Step("missing", 10, ("none",), needs="no-such-program"),
        Step("unknown", 10, ("none",), switches={"MODEST_ALIGN_EXPERIMENT": "no-such-switch"}),
        Step("works", 10, python("open('{result}', 'w').write('[1]'); print('done')")),
    ]
    assert not gpu_check.run(steps, tmp_path, "a GPU")
    assert list(statuses(tmp_path).values()) == ["failed", "timed out", "failed", "left out", "left out", "ok"]
    records = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [record["last"] for record in records.values()][:2] == ["ValueError: wrong", "waiting"]
    assert "no-such-program" in records["missing"]["last"]
    assert "this build knows no" in records["unknown"]["last"]
    assert records["works"]["result"] == [1]
    summary = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert [line.split()[-2:] for line in summary][-1] == ["works", "done"]
    assert len(summary) == len(steps)
    assert "Traceback" in (tmp_path / "gpu-check.log").read_text()


def test_a_part_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    code = f"open({str(counter)!r}, 'a').write('x')"
    steps = [Step("passes", 10, python(code)), Step("fails", 10, python(f"{code}; exit(1)"))]

    def runs(gpu: str, *again: str) -> int:
        before = counter.stat().st_size if counter.exists() else 0
        gpu_check.run(steps, tmp_path, gpu, again)
        return counter.stat().st_size - before

    assert [runs("one"), runs("one"), runs("one", "failed"), runs("one", "passes"), runs("one", "all")] == [
        2,
        0,
        1,
        1,
        2,
    ]
    assert runs("another") == 2  # one GPU's times say nothing of another's


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_check, "gpu_name", lambda: None)
    assert gpu_check.main(["1", "--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_in_the_wrong_order(tmp_path: Path) -> None:
    # Backwards, and without the build, which takes minutes: no step needs what another did.
    steps = [replace(step, seconds=120) for step in steps_of(2, dry=True) if "build" not in step.name][::-1]
    gpu_check.run(steps, tmp_path, "dry run")
    missing = set(gpu_check.BACKENDS) - set(BACKENDS)
    found = {name: status for name, status in statuses(tmp_path).items() if not missing & set(name.split("-"))}
    assert set(found.values()) <= {"ok", "left out"}, found
    assert found["addmm"] == "ok"
    assert all(found[f"host-{backend}"] == "ok" for backend in BACKENDS)


@pytest.mark.parametrize("name", ["addmm", "ceilings", "versus"])
def test_what_needs_no_backend(name: str) -> None:
    rows = list(gpu_measurements.MEASUREMENTS[name]("cpu", gpu_measurements.TINY, "eager"))
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert min(numbers) > 0


def test_blocks_of_the_sweep_are_the_librarys() -> None:
    *rows, best = gpu_measurements.addmm("cpu", gpu_measurements.TINY, "eager")
    assert sum(bool(row["gradient_block_with"]) for row in rows) == 1
    assert {"height", "width", "ms", "of_two_matmuls"} <= set(rows[0])
    assert best["fastest"] == str((rows[0]["height"], rows[0]["width"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["operations", "groups", "launches"])
def test_what_a_backend_does(name: str, backend: str) -> None:
    rows = list(gpu_measurements.MEASUREMENTS[name]("cpu", gpu_measurements.TINY, backend))
    assert rows


def test_a_switch_that_breaks_a_backend_fails_its_step(monkeypatch) -> None:
    failed = {"failed": "contrastive_stats: differs by 1.0e+00 from eager"}
    key = gpu_measurements.Key("contrastive_stats", "native")
    monkeypatch.setattr(gpu_measurements.operations, "measure", lambda *args: {key: failed})
    with pytest.raises(RuntimeError, match="differs by"):
        next(gpu_measurements.operation("cpu", gpu_measurements.TINY, "native"))


def test_clocks_are_read_while_a_task_runs(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1755, 2619, 650.5, 61, 0x0000000000000004'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    row = gpu_measurements.watched(lambda: None, "cpu", 0.2)
    assert row["samples"] > 0
    assert (row["sm_mhz"], row["watts"], row["limited_by"]) == (1755.0, 650.5, "0x0000000000000004")


def test_ncu_rows_are_one_a_launch() -> None:
    text = """==PROF== Profiling "matmul_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","void matmul_kernel<StatsTile<(int)256>>(Params)","GPU Speed Of Light Throughput","Duration","us","812.4"
"0","void matmul_kernel<StatsTile<(int)256>>(Params)","GPU Speed Of Light Throughput","","",""
"1","merge_kernel(const float *)","GPU Speed Of Light Throughput","Duration","us","7.1"
"""
    assert gpu_measurements.parse_ncu(text) == [
        {"kernel": "matmul_kernel<StatsTile<256>>", "Duration": "812.4 us"},
        {"kernel": "merge_kernel", "Duration": "7.1 us"},
    ]
    assert gpu_measurements.parse_ncu("==ERROR== no permission") == []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> Path:
    """A project whose builds are files that name their experiment, or fail."""
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "modest_align_kernels").mkdir()
    (tmp_path / "setup.py").write_text(
        "import os, pathlib, sys\n"
        "name = os.environ['MODEST_ALIGN_EXPERIMENT']\n"
        "if name == 'broken': sys.exit(7)\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--build-lib') + 1], 'modest_align_kernels')\n"
        "folder.mkdir()\n"
        f"(folder / '_C{gpu_build.SUFFIX}').write_text('built ' + name)\n"
    )
    return tmp_path


def test_a_kept_extension_is_placed_and_not_built(tree: Path) -> None:
    placed = tree / "modest_align_kernels" / f"_C{gpu_build.SUFFIX}"
    gpu_build.kept(tree).write_text("kept")
    assert gpu_build.main(tree, []) == 0
    assert placed.read_text() == "kept"
    (tree / "csrc" / "new.cu").write_text("changed")
    assert gpu_build.main(tree, []) == 0
    assert placed.read_text() == gpu_build.kept(tree).read_text() == "built "
    assert len(list(tree.glob("_C-*"))) == 1


def test_experiments_are_kept_beside_it(tree: Path, capsys) -> None:
    gpu_build.kept(tree, "stagger").write_text("kept")
    assert gpu_build.main(tree, ["broken", "pingpong64", "stagger"]) == 1
    assert capsys.readouterr().out == "did not compile: broken\n"
    builds = {name: gpu_build.kept(tree, name) for name in ("", "broken", "pingpong64", "stagger")}
    assert {name: file.exists() and file.read_text() for name, file in builds.items()} == {
        "": "built ",
        "broken": False,
        "pingpong64": "built pingpong64",
        "stagger": "kept",
    }
    assert (tree / "modest_align_kernels" / f"_C{gpu_build.SUFFIX}").read_text() == "built "


@pytest.mark.skipif(available_backends("cpu")["native"] is not None, reason="the extension is not built")
def test_a_module_runs_on_a_build_of_an_experiment(tmp_path: Path) -> None:
    from modest_align_kernels import _C

    (tmp_path / "prints.py").write_text(
        "import sys; from modest_align_kernels.backends import native; print(native._C.__file__, *sys.argv[1:])"
    )
    build = gpu_build.kept(tmp_path, "stagger")
    gpu_build.place(Path(str(_C.__file__)), build)
    command = [sys.executable, "-m", "benchmarks.gpu_build", str(tmp_path), "--with", "stagger", "prints", "--tiny"]
    path = os.pathsep.join(map(str, (tmp_path, gpu_check.ROOT)))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{build} --tiny\n"


def test_native_experiments_run_on_their_builds_or_not_at_all(tmp_path: Path) -> None:
    steps = {step.name: step for step in steps_of(2)}
    for name in gpu_check.EXPERIMENTS["native"]:
        step = steps[f"native-with-{name}"]
        assert step.switches == {"MODEST_ALIGN_EXPERIMENT": name}
        assert gpu_check.why_left_out(step, tmp_path) == f"there is no build of {name} in {tmp_path}"
        gpu_build.kept(tmp_path, name).touch()
        assert gpu_check.why_left_out(step, tmp_path) is None
        assert name in steps["builds"].command
