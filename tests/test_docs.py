"""The documentation: its code runs, its errors are raised, its commands exist, and its pages are on the site."""

from __future__ import annotations

import ast
import doctest
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import modest_align_kernels
from benchmarks import __main__ as benchmarks
from benchmarks import gpu_check, ranks
from benchmarks.recipes import DOCS, code
from modest_align_train import cli

ROOT = DOCS.parent
ERRORS = DOCS / "troubleshooting.md"
ELSEWHERE = {ERRORS, DOCS / "integrations.md"}  # raised below; run by the tests of the integrations
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE], ids=lambda page: page.name)
def test_code_runs(page: Path) -> None:
    with torch.random.fork_rng():
        exec(code(page), {"__name__": page.stem})


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=lambda page: page.name)
def test_the_loss_comes_first_in_six_lines(page: Path) -> None:
    text = text_of(page)
    first = blocks(text, "python")[0]
    assert len([line for line in first.splitlines() if line]) <= 6
    assert text.index(first) < min((text.index(mark) for mark in ("\n| ", "```sh") if mark in text), default=len(text))
    assert first == blocks(text_of(PAGES[0]), "python")[0]


def test_in_the_place_of_open_clip() -> None:
    names: dict = {}
    exec(code(DOCS / "index.md"), names)
    features = *names["features"], names["logit_scale"]
    torch.testing.assert_close(names["after"](*features), names["before"](*features))


@pytest.mark.parametrize("name", modest_align_kernels.__all__)
def test_examples_of_docstrings(name: str) -> None:
    thing = getattr(modest_align_kernels, name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(thing, name, globs={name: thing}):
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


def quotes() -> list[tuple[str, str | None]]:
    """The sentences of the page of errors, each with the code that raises it, if there is some."""
    found = re.findall(r"^> `([^\n]*)`$\n(.*?)(?=^> |^## |\Z)", text_of(ERRORS), re.DOTALL | re.MULTILINE)
    return [(sentence, next(iter(blocks(text, "python")), None)) for sentence, text in found]


@cache
def messages() -> list[str]:
    """Every string of the sources, with … for what a formatted one puts in."""
    found = []
    for folder in ("modest_align_kernels", "python/modest_align_train"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return [plain(message) for message in found]


def plain(sentence: str) -> str:
    """Without what the program makes of arguments' names: flags."""
    return sentence.replace("--", "").replace("-", "_")


@pytest.mark.parametrize(("sentence", "raising"), quotes(), ids=lambda value: str(value)[:40])
def test_errors_are_what_the_page_says(sentence: str, raising: str | None) -> None:
    if raising is None:
        pattern = re.compile(re.escape(plain(sentence)).replace("…", "[^\n]*"))
        assert any(pattern.fullmatch(message) for message in messages()), sentence
        return
    names: dict = {}
    exec(blocks(text_of(ERRORS), "python")[0], names)
    pattern = re.escape(sentence).replace("…", "[^\n]*")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{pattern}[^\n]*$"):
        exec(raising, names)


PROGRAMS = {
    "modest-align": cli.main,
    "python -m benchmarks": benchmarks.main,
    "python -m benchmarks.ranks": ranks.main,
    "python -m benchmarks.gpu_check": gpu_check.main,
}


def commands() -> set[tuple[str, ...]]:
    """Program, subcommand (or nothing) and flags of every line of shell that calls one of ours."""
    found = set()
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"):
        for line in "".join(blocks(text_of(page), "sh")).splitlines():
            line = re.sub(r"^torchrun .* -m modest_align_train", "modest-align", line)
            called = re.match(r"(modest-align) (\w+)|(python -m benchmarks[.\w]*)()(?= |$)", line)
            program, subcommand = [group for group in called.groups() if group is not None] if called else (None, "")
            if program in PROGRAMS:
                found.add((program, subcommand, *re.findall(r"--[a-z-]+", line)))
    return found


@pytest.mark.parametrize("command", sorted(commands()), ids=" ".join)
def test_commands_and_flags_exist(command: tuple[str, ...], capsys) -> None:
    program, subcommand, *flags = command
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program]([*subcommand.split(), "--help"])
    assert not stop.value.code
    assert set(flags) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_promises_name_tests_that_exist() -> None:
    named = re.findall(r"`(\S+\.py)(?:::(\w+))?`", text_of(DOCS / "promises.md"))
    assert named
    for file, test in named:
        assert re.search(rf"^def {test or 'test_'}", text_of(ROOT / "tests" / file), re.MULTILINE), (file, test)


def test_targets_of_make_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Of the pages that are not on the site: MkDocs checks the others."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text_of(page)):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text_of(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
