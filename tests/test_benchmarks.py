"""The benchmarks once, tiny, so that none rots; their truth and rules; and README's blocks are what is stored."""

from __future__ import annotations

import copy
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import (
    clock,
    losses,
    machine,
    operations,
    others,
    ranks,
    readme,
    results,
    table,
    test_losses,
    truth,
    workloads,
)
from benchmarks.providers import PLAIN_PROVIDER, Provider, all_providers, from_loss, plain_loss
from benchmarks.results import FLOOR, PLAIN, Key
from benchmarks.step import NO_LOSS
from benchmarks.workloads import SCALE, Workload
from modest_align_kernels import available_backends, reference

TINY = Workload("loss", 48, 16, "float32")
MINE = Key("ours", "eager")


def measured(*others: Provider) -> dict:
    return losses.measure(TINY, [PLAIN_PROVIDER, *others], clock.Run("cpu", 2))


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict:
    """A whole run of the command, tiny, with every provider that needs no compiler."""
    output = tmp_path_factory.mktemp("benchmarks") / "result.json"
    names = [str(p.key) for p in all_providers("cpu") if not p.compiled]
    command = ["--rounds", "2", "--dtypes", "float32", "--output", str(output), "--providers", *names]
    assert benchmarks.main([*command, "--rows", "32", "--features", "16", "--only", "operations", "step"]) == 0
    assert benchmarks.main([*command, "--rows", "32", "48", "--features", "16", "24"]) == 0
    for name in ("result.png", "result-floor.png"):
        assert output.with_name(name).stat().st_size > 10_000
    stored = results.load(output)
    assert output.with_suffix(".md").read_text() == table.full_tables(stored)
    return stored


def test_every_workload_is_stored_with_its_origin(stored) -> None:
    kinds = [case["kind"] for case in stored["workloads"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"loss": 4, "operations": 1, "step": 1}
    assert {"device", "threads", "memory_gib"} <= set(stored["machine"])
    assert stored["left_out"] == {}
    for case in stored["workloads"]:
        assert {"versions", "commit", "date", "wait_policy"} <= set(case)
        for result in case["results"].values():
            assert "failed" in result or (len(result["seconds"]) == 2 and min(result["seconds"]) > 0)
    cases = [{**case, "wait_policy": "passive"} for case in stored["workloads"]]
    assert table.heading(stored, cases).endswith("`OMP_WAIT_POLICY` passive.")


def test_losses_are_side_by_side_with_the_floor(stored) -> None:
    for case in table.select(stored, "loss"):
        assert {FLOOR, PLAIN, MINE} <= {n for n, r in case["results"].items() if "seconds" in r}
        for key, result in case["results"].items():
            if "seconds" in result and key != FLOOR:
                assert result["gradient_error"] < 1e-4
                assert result["loss_error"] < 1e-5
                assert result["scale_error"] < 1e-3
                assert result["peak_extra_mib"] > 0


def test_operations_have_each_their_floor(stored) -> None:
    for case in table.select(stored, "operations"):
        for operation in operations.OPERATIONS:
            assert "seconds" in case["results"][results.floor_of(operation)]
            assert "seconds" in case["results"][Key(operation, "eager")]


def test_the_step_is_measured_with_and_without_its_loss(stored) -> None:
    for case in table.select(stored, "step"):
        assert {NO_LOSS, PLAIN, MINE} <= {n for n, r in case["results"].items() if "seconds" in r}


def test_tables_show_what_is_stored(stored) -> None:
    text = table.full_tables(stored)
    assert text.count(f"| {MINE} |") == 4 + 1
    assert "| contrastive_grads | eager |" in text
    short = table.short_table(stored)
    assert f"| {MINE} |" in short
    assert "B = 32" in short
    changed = copy.deepcopy(stored)
    table.select(changed, "loss")[0]["results"][PLAIN] = {"failed": "out of memory"}
    assert "| plain | out of memory |" in table.full_tables(changed)


@pytest.mark.parametrize("provider", [p for p in all_providers("cpu") if not p.compiled], ids=lambda p: str(p.key))
def test_each_provider_runs_or_says_why_not(provider: Provider) -> None:
    result = measured(provider)[provider.key]
    if provider.needs_gpu:
        assert result == {"failed": "needs a GPU"}
    elif "failed" in result:
        assert (
            result["failed"].startswith("not installed")
            or "has no chunked" in result["failed"]
            or "Triton" in str(result)
        )
    else:
        assert result["gradient_error"] < 1e-4
        assert len(result["seconds"]) == 2


@pytest.mark.slow
def test_the_compiled_provider_is_compiled_before_it_is_timed() -> None:
    compiled = next(p for p in all_providers("cpu") if p.compiled)
    result = measured(compiled)[compiled.key]
    assert "failed" in result or max(result["seconds"]) < 0.5


@pytest.mark.parametrize("kind", others.OTHERS)
def test_other_losses_run_beside_their_libraries(kind: str, tmp_path) -> None:
    output = tmp_path / "result.json"
    command = ["--rows", "48", "--features", "16", "--only", kind, "--rounds", "2", "--output", str(output)]
    names = [str(p.key) for p in others.providers(kind, "cpu") if not p.compiled and p.key != PLAIN]
    assert benchmarks.main([*command, "--providers", *names]) == 0
    found = results.load(output)["workloads"][0]["results"]
    assert {str(key) for key in found} == set(names)
    assert found[MINE]["gradient_error"] < 1e-5
    for key, result in found.items():
        if "failed" in result:
            assert result["failed"].startswith("not installed") or key.backend == "triton"
        else:
            assert len(result["seconds"]) == 2
            assert result.get("gradient_error", 0.0) < 1e-4
            assert "gradient_error" in result or "another loss" in result["note"]
    text = output.with_suffix(".md").read_text()
    assert "## Other losses" in text
    assert f"| {MINE} |" in text
    plain = next(p for p in others.providers(kind, "cpu") if p.key == PLAIN)
    inputs = truth.make_inputs(Workload(kind, 48, 16, "float32"), "cpu")
    errors = truth.compare(plain.load()(*inputs), others.exact(kind, inputs), 1.0)
    assert max(errors.values()) < 1e-4


def test_a_provider_that_raises_is_a_row() -> None:
    def load():
        raise ImportError("no module named contrast")

    def fail(x, y, scale):
        raise RuntimeError("only square matrices\n at line 3")

    def later(x, y, scale, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_loss(x, y, scale)

    found = measured(
        Provider(Key("missing"), load),
        Provider(Key("broken"), lambda: from_loss(fail)),
        Provider(Key("later"), lambda: from_loss(later)),
        Provider(Key("absent"), load, package="no-such-package"),
    )
    assert found[Key("missing")] == {"failed": "ImportError: no module named contrast"}
    assert found[Key("broken")] == {"failed": "only square matrices"}
    assert found[Key("later")] == {"failed": "out of memory"}
    assert found[Key("absent")] == {"failed": "not installed (pip install no-such-package)"}
    assert len(found[PLAIN]["seconds"]) == 2


def test_a_wrong_loss_is_not_timed() -> None:
    wrong = Provider(Key("wrong"), lambda: from_loss(lambda x, y, s: plain_loss(x, y, s) * 1.01))
    other = Provider(Key("other"), lambda: from_loss(lambda x, y, s: plain_loss(x, y, s) * 2), same_loss=False)
    found = measured(wrong, other)
    assert found[wrong.key]["failed"].startswith("wrong: loss error 1.0e-02")
    assert "seconds" not in found[wrong.key]
    assert "seconds" in found[other.key]
    assert "gradient_error" not in found[other.key]


@pytest.mark.parametrize("scale", [1.0, SCALE, 100.0])
def test_the_truth_is_the_reference(scale: float) -> None:
    inputs = truth.make_inputs(Workload("loss", 40, 24, "float32"), "cpu")
    x, y = (t.detach().double().requires_grad_() for t in inputs[:2])
    tensor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = reference.modest_align_loss(x, y, tensor)
    expected = torch.autograd.grad(loss, (x, y, tensor))
    sample = torch.tensor([0, 7, 39])
    found = truth.exact(x.detach(), y.detach(), scale, sample)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.image_grad, expected[0][sample])
    torch.testing.assert_close(found.text_grad, expected[1][sample])
    torch.testing.assert_close(found.scale_grad, expected[2])
    exact = (loss.detach(), *expected)
    errors = truth.compare(exact, found, 1.0)
    assert max(errors["loss_error"], errors["gradient_error"], errors["scale_error"]) < 1e-9
    assert truth.compare((loss.detach(), expected[0] * 1.5, *expected[1:]), found, 1.0)["worst_row_error"] > 0.4


def test_what_does_not_fit_is_predicted_not_tried(monkeypatch) -> None:
    monkeypatch.setattr(losses, "PREDICT_ROWS", 200)
    monkeypatch.setattr(losses, "PROBE_ROWS", (64, 128))
    workload = Workload("loss", 256, 16, "float32")
    known, wall = (
        losses.measure(workload, [PLAIN_PROVIDER], clock.Run("cpu", 1, memory))[PLAIN] for memory in (2.0**40, 2.0**19)
    )
    assert wall["failed"].startswith("needs")
    assert wall["predicted_mib"] == pytest.approx(known["peak_extra_mib"], rel=0.1)
    bounded = dataclasses.replace(PLAIN_PROVIDER, bounded=True)
    assert "seconds" in losses.measure(workload, [bounded], clock.Run("cpu", 1, 2.0**19))[PLAIN]


def test_noise_hits_all_alike_in_rounds() -> None:
    order: list[str] = []
    found: dict = {}
    clock.interleave({Key(name): (lambda name=name: order.append(name)) for name in "abc"}, found, clock.Run("cpu", 3))
    assert {key.name: len(result["seconds"]) for key, result in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[::2] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def slower(stored: dict, factor: float) -> dict:
    changed = copy.deepcopy(stored)
    for case in table.select(changed, "loss"):
        result = case["results"][MINE]
        case["results"][MINE] = {**result, "seconds": [factor * t for t in result["seconds"]]}
    return changed


def test_compare_fails_what_is_slower_on_the_same_device(stored) -> None:
    steady = copy.deepcopy(stored)
    for case in table.select(steady, "loss"):
        for i, result in enumerate(case["results"].values()):
            if "seconds" in result:
                result["seconds"] = [(1 + i) * 0.01, (1 + i) * 0.0101]
    text, worse = table.compare_runs(steady, slower(steady, 1.5))
    assert len(worse) == 4
    assert "1.50 times as slow" in worse[0]
    assert f"| {MINE} |" in text
    assert table.compare_runs(steady, steady)[1] == []
    assert table.compare_runs(steady, slower(steady, 0.5))[1] == []
    noisy = slower(steady, 1.5)
    for case in table.select(noisy, "loss"):
        case["results"][MINE]["seconds"][0] /= 3
    assert table.compare_runs(steady, noisy)[1] == []
    elsewhere = slower(steady, 1.5)
    elsewhere["machine"] = {**elsewhere["machine"], "device": "another"}
    assert table.compare_runs(steady, elsewhere)[1] == []


def test_compare_is_the_exit_status(stored, tmp_path, capsys) -> None:
    for factor, status in ((1e-3, 1), (1e3, 0)):
        old = tmp_path / "old.json"
        results.save(slower(stored, factor), old)
        command = ["--rows", "32", "--features", "16", "--rounds", "3", "--dtypes", "float32", "--providers", "eager"]
        assert benchmarks.main([*command, "--output", str(tmp_path / "new.json"), "--compare", str(old)]) == status
    assert "times as slow" in capsys.readouterr().out


def test_the_budget_leaves_out_and_says_so(tmp_path) -> None:
    output = tmp_path / "result.json"
    assert benchmarks.main(["--workloads", "simclr", "--budget", "0", "--output", str(output)]) == 0
    stored = results.load(output)
    assert stored["workloads"] == []
    assert "--budget" in stored["left_out"]["loss 4,096 x 512 float32"]


def test_a_partial_run_replaces_only_its_workloads(stored, tmp_path) -> None:
    output = tmp_path / "result.json"
    earlier = copy.deepcopy(stored)
    for case in earlier["workloads"]:
        case["commit"] = "earlier"
    earlier["left_out"] = {"loss 32 x 24 float32": "measured meanwhile", "loss 64 x 24 float32": "too large"}
    results.save(earlier, output)
    command = ["--rows", "32", "--features", "24", "--rounds", "1", "--providers", "eager", "--output", str(output)]
    assert benchmarks.main(command) == 0
    now = results.load(output)
    assert [case["commit"] == "earlier" for case in now["workloads"]] == [
        (case["kind"], case["rows"], case["features"]) != ("loss", 32, 24) for case in earlier["workloads"]
    ]
    assert now["left_out"] == {"loss 64 x 24 float32": "too large"}
    assert table.full_tables(now).count("| earlier |") == 5
    earlier["machine"]["device"] = "another"
    results.save(earlier, output)
    assert benchmarks.main(command) == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--providers", "nobody"], "--providers: got 'nobody', want (parts of) ours (eager)"),
        (["--workloads", "huge"], "--workloads: got huge, want some of 256x512, minilm"),
        (["--rows", "0"], "--rows: got 0"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--compare", "no/such.json"], "no/such.json"),
        (["--compare", str(readme.DEMO)], "demo.json holds no results"),
    ],
)
def test_bad_arguments_are_one_sentence(command, words, capsys) -> None:
    assert benchmarks.main(command) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_workloads_have_a_source(device: str) -> None:
    for full in (False, True):
        chosen = workloads.default_workloads(device, full)
        assert len(set(chosen)) == len(chosen)
        for workload in chosen:
            assert workload.rows in workloads.ROWS or workload.rows > 65_536
            assert workload.features in workloads.FEATURES


class Benchmark:
    """As much of pytest-benchmark's fixture as the suite uses: the suite's own run has the real one."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.runs = "", {}, 0

    def pedantic(self, task, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            task()
            self.runs += 1


def test_the_pytest_benchmark_suite_runs() -> None:
    benchmark = Benchmark()
    test_losses.bench_loss(benchmark, all_providers("cpu")[0], 32, 16)
    assert benchmark.extra_info["gradient_error"] < 1e-4
    backends = [name for name, why in available_backends("cpu").items() if why is None and name != "triton"]
    assert backends == operations.measured_backends("cpu")
    for name in operations.OPERATIONS:
        test_losses.bench_operation(benchmark, name, "eager", 32, 16)
    assert benchmark.runs == 6 * 8


def test_sentences_are_one_line() -> None:
    assert clock.sentence(RuntimeError("")) == "no message"
    assert clock.sentence(ValueError("a\nb")) == "ValueError: a"
    assert len(clock.sentence(RuntimeError("x" * 500))) == 160


def test_a_machine_and_an_origin_have_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.machine("cpu")
    assert found["device"]
    assert found["memory_gib"] > 0
    assert machine.origin()["versions"]["torch"] == torch.__version__
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.origin()["wait_policy"] == "passive"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert machine.origin()["wait_policy"] == "unset"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "expected"),
    [
        ("AuthenticAMD", 26, 2, "AMD EPYC", "AMD EPYC (Zen 5)"),
        ("AuthenticAMD", 25, 17, "AMD EPYC", "AMD EPYC (Zen 4)"),
        ("AuthenticAMD", 25, 1, "AMD EPYC Processor", "AMD EPYC (Zen 3)"),
        ("AuthenticAMD", 25, 0x21, "", "AuthenticAMD (Zen 3)"),
        ("AuthenticAMD", 25, 0xA0, "AMD EPYC", "AMD EPYC (Zen 4)"),
        ("AuthenticAMD", 23, 49, "AMD EPYC", "AMD EPYC (Zen 2)"),
        ("AuthenticAMD", 26, 0x50, "AMD EPYC", "AMD EPYC (family 26, model 80)"),
        ("AuthenticAMD", 25, 97, "AMD Ryzen 9 7950X 16-Core Processor", "AMD Ryzen 9 7950X"),
        ("GenuineIntel", 6, 85, "Intel(R) Xeon(R) CPU @ 2.00GHz", "Intel Xeon (family 6, model 85)"),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8488C", "Intel Xeon Platinum 8488C"),
    ],
)
def test_a_cpu_is_named_by_what_says_something(vendor, family, model, name, expected) -> None:
    first = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
    assert (
        machine.cpu_name(f"{first}flags\t\t: fpu vme\npower management:\n\nprocessor\t: 1\nmodel name\t: x\n")
        == expected
    )


def test_an_arm_cpu_is_named_by_its_numbers() -> None:
    cpuinfo = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"
    assert machine.cpu_name(cpuinfo) == "Arm (implementer 0x41, part 0xd40)"
    assert machine.cpu_name("") != ""


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [("cpu", "AMD EPYC (Zen 5)", "amd-epyc-zen-5-2t.json"), ("cuda", "NVIDIA H200", "nvidia-h200.json")],
)
def test_a_chip_names_its_file(kind: str, name: str, file: str) -> None:
    assert machine.default_output({"type": kind, "device": name, "threads": 2}).name == file


def test_a_gpu_has_its_name(monkeypatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=2**37)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_properties=lambda index: properties))
    assert machine.machine("cuda")["device"] == "NVIDIA H200"


def test_each_chip_has_a_section_and_rows_in_readme(stored, tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        results.save({**stored, "machine": {**stored["machine"], "device": name}}, tmp_path / f"{name}.json")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    pages = readme.pages()
    text = pages[readme.PAGE_OF_SPEED]
    assert text.index("## one, ") < text.index("(../benchmarks/results/one.png)") < text.index("## two, ")
    rows = re.findall(r"^\| (one|two), .*", pages[readme.README], re.MULTILINE)
    assert rows == sorted(rows)
    assert set(rows) == {"one", "two"}
    assert [path.name for path in readme.tables()] == ["one.md", "two.md"]


def test_ranks_beside_open_clip(tmp_path) -> None:
    ranks.main(
        ["--ranks", "2", "--rows", "64", "--features", "64", "--rounds", "1", "--output", str(tmp_path / "r.md")]
    )
    lines = (tmp_path / "r.md").read_text(encoding="utf-8").splitlines()
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ")[2:] for line in lines if line.startswith("| 2 ")}
    assert cells["ours, gather"] == cells["ours, ring"] == ["1.0000", "1.0000"]
    assert cells["open_clip, local_loss=True, gather_with_grad=True"] == ["1.0000", "1.0000"]
    for worse in ("local_loss=False, gather_with_grad=False", "local_loss=True, gather_with_grad=False"):
        norm, cosine = map(float, cells[f"open_clip, {worse}"])
        assert norm < 0.9
        assert cosine < 0.99
    gathered = next(line.split(" | ") for line in lines if line.startswith("| 2 | ours, gather"))
    assert gathered[3] == "0.500"  # matmuls
    assert float(gathered[5]) < 0.53


def test_pages_show_the_stored_results() -> None:
    for path, wanted in {**readme.pages(), **readme.tables()}.items():
        assert path.read_text(encoding="utf-8") == wanted, "run `make readme`"
