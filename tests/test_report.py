"""The report of real, tiny runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from test_search import write_pairs
from train_data import write_store

from modest_align_train import examples as examples_module
from modest_align_train import report as report_module
from modest_align_train.evaluate import evaluate
from modest_align_train.figures import plot, recall_figure
from modest_align_train.latents import load_latents
from modest_align_train.report import Section, write_report
from modest_align_train.runs import load_run
from modest_align_train.settings import Settings
from modest_align_train.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Latents and two runs on them that differ in noise."""
    root = tmp_path_factory.mktemp("report")
    write_pairs(root / "latents", images=60, splits=("train", "train", "validation", "test"))
    settings = Settings(
        latents=root / "latents",
        output=root / "plain",
        steps=6,
        batch_size=16,
        embedding_dim=8,
        latent_noise_std=0.0,
        log_every=2,
        validate_every=2,
        warmup_steps=1,
        device="cpu",
    )
    for changed in (settings, replace(settings, output=root / "noisy", latent_noise_std=0.03)):
        evaluate(train(changed, progress=False), bootstrap=50, device="cpu")
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy that a test may damage; its settings still point to the shared latents."""
    for name in ("plain", "noisy", "latents"):
        shutil.copytree(trained / name, tmp_path / name)
    examples_module.thumbnail.cache_clear()
    return tmp_path


def page_of(runs, root, **keywords) -> str:
    return write_report(runs, root / "page.html", **keywords).read_text(encoding="utf-8")


def visible(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split())


def test_page_shows_the_numbers_of_the_evaluation(root):
    evaluation = json.loads((root / "plain" / "evaluation.json").read_text(encoding="utf-8"))
    text = visible(page_of([root / "plain"], root))
    for direction in ("image_to_text", "text_to_image"):
        for name in ("R@1", "R@5", "R@10"):
            found = evaluation[direction][name]
            assert f"{found['value']:.1f} {found['low']:.1f}–{found['high']:.1f}" in text
        assert f"ECE {evaluation['calibration'][direction]['ece']['value']:.1f}%" in text
    assert f"{evaluation['images']} test images" in text
    assert torch.__version__ in text
    assert "embedding_dim 8" in text


def test_recall_figure_draws_values_and_intervals(root):
    run = load_run(root / "plain")
    drawn = [list(line.get_xdata()) for line in recall_figure([run], "text_to_image").axes[0].lines]
    expected = [run.evaluation["text_to_image"][name] for name in ("R@1", "R@5", "R@10")]
    assert drawn[0::2] == [[one["low"], one["high"]] for one in expected]
    assert drawn[1::2] == [[one["value"]] for one in expected]


def test_page_fetches_nothing(root):
    page = page_of([root / "plain", root / "noisy"], root)
    sources = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "<script" not in page
    assert "<link" not in page


def test_svg_references_stay_within_the_page(root):
    page = page_of([root / "plain", root / "noisy"], root)
    defined = re.findall(r'\bid="([^"]*)"', page)
    used = set(re.findall(r"url\(#([^)]*)\)", page)) | set(re.findall(r'href="#([^"]*)"', page))
    assert used
    assert used <= set(defined)
    assert len(defined) == len(set(defined))


def test_several_runs_are_told_apart(root):
    page = page_of([root / "plain", root / "noisy"], root)
    text = visible(page)
    assert "2 runs aligned drawn-image with drawn-text" in text
    assert "R@1 over plain" in text
    assert re.search(r"run latent_noise_std plain 0\.0 noisy 0\.03", text)
    assert page.count("mean ECE ") == 2


def test_runs_of_equal_folder_names_get_their_parents(root):
    (root / "again").mkdir()
    shutil.copytree(root / "plain", root / "again" / "plain")
    assert "again/plain" in visible(page_of([root / "plain", root / "again" / "plain"], root))
    with pytest.raises(ValueError, match="runs must differ"):
        page_of([root / "plain", root / "plain"], root)


def test_examples_follow_their_rule(root):
    examples = examples_module.find_examples(root / "plain", load_latents(root / "latents").subset("test"))
    for kinds in examples.values():
        assert len(kinds["hits"]) <= 4
        assert len(kinds["misses"]) <= 4
        assert kinds["hits"]
        assert all(any(one["right"] for one in example["found"]) for example in kinds["hits"])
        assert not any(one["right"] for example in kinds["misses"] for one in example["found"])
    for example in examples["from_text"]["hits"]:
        assert example["found"][example["rank"] - 1]["right"]
    for example in examples["from_text"]["misses"]:
        assert example["rank"] > 5


def test_one_image_of_each_group_in_the_order_of_the_hash(root):
    latents = load_latents(root / "latents")
    paired = replace(latents, group=torch.arange(60) // 2)
    rows = examples_module._one_of_each_group(paired)
    assert sorted(row // 2 for row in rows) == list(range(30))
    everything = examples_module._one_of_each_group(latents)
    assert rows == [row for row in everything if everything.index(row) < everything.index(row ^ 1)]


def test_captions_are_escaped(root):
    latents = load_latents(root / "latents")
    evil = [replace(r, captions=("<script>alert(1)</script>", r.captions[1])) for r in latents.records]
    write_store(root / "latents", [(latents.image, latents.text, evil)])
    page = page_of([root / "plain"], root, latents=root / "latents", title="<i>title</i>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "<i>" not in page


def test_missing_images_leave_a_placeholder(root):
    latents = load_latents(root / "latents")
    write_store(
        root / "latents", [(latents.image, latents.text, [replace(r, location="gone.png") for r in latents.records])]
    )
    page = page_of([root / "plain"], root, latents=root / "latents")
    assert "image not found" in page
    assert "<img" not in page


def test_missing_latents_leave_a_sentence_unless_they_were_asked_for(root):
    settings = root / "plain" / "settings.toml"
    settings.write_text(re.sub("latents = .*", 'latents = "gone"', settings.read_text(encoding="utf-8")))
    assert "No examples: gone holds no latents" in visible(page_of([root / "plain"], root))
    with pytest.raises(FileNotFoundError, match="holds no latents"):
        page_of([root / "plain"], root, latents=root / "nowhere")


def test_a_run_that_was_not_evaluated_is_evaluated(root):
    (root / "plain" / "evaluation.json").unlink()
    page_of([root / "plain"], root)
    assert (root / "plain" / "evaluation.json").is_file()


def test_a_page_is_of_the_test_split_whatever_was_evaluated_last(root):
    page = page_of([root / "plain", root / "noisy"], root)
    evaluate(root / "plain", split="validation", bootstrap=5)
    assert page_of([root / "plain", root / "noisy"], root) == page
    stored = root / "plain" / "evaluation.json"
    stored.write_text((root / "plain" / "evaluation-validation.json").read_text())
    assert visible(page_of([root / "plain"], root)).count("15 test images") == 1
    assert json.loads(stored.read_text())["split"] == "test"


def test_a_page_shows_nothing_stale(root):
    stored = root / "plain" / "evaluation.json"
    evaluation = json.loads(stored.read_text())
    evaluation["mean"]["R@1"]["value"] = 12.3
    stored.write_text(json.dumps(evaluation))
    assert "for 12.3% of the queries" in visible(page_of([root / "plain"], root))
    shutil.copy(root / "noisy" / "best.safetensors", root / "plain" / "best.safetensors")
    assert "12.3%" not in visible(page_of([root / "plain"], root))
    del evaluation["checkpoint"]  # as versions wrote it that did not say what an evaluation is of
    stored.write_text(json.dumps(evaluation))
    assert "12.3%" not in visible(page_of([root / "plain"], root))


def test_latents_that_were_extracted_again_make_no_page(root):
    settings = root / "plain" / "settings.toml"
    moved = re.sub("latents = .*", f'latents = "{root}/latents"', settings.read_text(encoding="utf-8"))
    settings.write_text(moved)
    page_of([root / "plain"], root)
    write_pairs(root / "latents", images=60, splits=("test", "train", "train", "validation"))
    with pytest.raises(
        ValueError, match=r"latents .* are not those that .*plain was trained on, they were extracted ag"
    ):
        page_of([root / "plain"], root)


def test_runs_on_other_pairs_share_no_page(root):
    write_pairs(root / "other", images=20, splits=("train", "train", "validation", "test"))
    settings = replace(load_run(root / "plain").settings, latents=root / "other", output=root / "third")
    train(settings, progress=False)
    with pytest.raises(
        ValueError, match="same images and captions, but plain and third were not: name latents for all"
    ):
        page_of([root / "plain", root / "third"], root)
    page = page_of([root / "plain", root / "third"], root, latents=root / "other")
    assert "R@1 over plain" in visible(page)
    assert "5 test images" in visible(page)


def test_every_table_shows_that_it_scrolls(root):
    page = page_of([root / "plain", root / "noisy"], root)
    assert page.count("<table") == page.count('<div class="scroll" tabindex="0"><table') > 3
    # A shadow that stays at the edge, under a cover that moves with the table.
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto;[^}]*background-attachment: local, scroll;", page)


def test_sections_and_table_come_from_the_caller(root):
    axes = plot("Sweep <of> noise", "latent_noise_std", "R@1, %")
    axes.plot([0, 1], [1, 2], label="clean $x")
    axes.legend()
    foreign = Figure()
    foreign.subplots().set_title("another style")
    page = page_of(
        [root / "plain"],
        root,
        sections=[
            Section("Noise", "a & b", axes.figure),
            Section("More", Markup("<b>bold</b>"), foreign),
            Section("Words"),
            Section("Cells", table=[["run", "top-1 %"], ["<first>", "40.5"]]),
        ],
        table=[["seeds", "R@1"], ["3", "20.1\n19–21"]],
    )
    assert "a &amp; b" in page
    assert "<b>bold</b>" in page
    assert "Sweep &lt;of&gt; noise" in page
    assert "clean $x" in page
    assert "another style" in page
    assert "<td>20.1\n19–21</td>" in page
    assert "<th>top-1 %</th>" in page
    assert "<td>&lt;first&gt;</td><td>40.5</td>" in page
    # The ink follows the page's light or dark mode, also in figures of another style.
    assert "#010203" not in page
    assert re.search(r"fill: currentColor[^>]*>another style", page)


def test_half_a_line_at_the_end_of_the_log_is_left_out(root):
    with (root / "plain" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 8, "lo')
    assert "Training loss" in page_of([root / "plain"], root)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_told_without_a_write_into_the_repository(tmp_path, monkeypatch):
    """Git stored its index anew; on a full disk it left a lock behind, with which no commit could be made."""
    file = tmp_path / "report.py"
    monkeypatch.setattr(report_module, "__file__", str(file))
    assert report_module._commit() is None
    file.write_text("one")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    os.utime(file, (1, 1))
    index = (tmp_path / ".git" / "index").read_bytes()
    commit = report_module._commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    file.write_text("two")
    assert report_module._commit() == f"{commit}-dirty"
    assert (tmp_path / ".git" / "index").read_bytes() == index


def test_a_failed_page_leaves_the_old_one(root, monkeypatch):
    (root / "page.html").write_text("old")
    monkeypatch.setattr(report_module, "find_examples", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page_of([root / "plain"], root)
    assert (root / "page.html").read_text() == "old"
    assert not list(root.glob(".page*"))


@pytest.mark.parametrize(
    ("runs", "keywords", "error", "sentence"),
    [
        ([], {}, ValueError, "runs must name at least one run directory"),
        (["nowhere"], {}, FileNotFoundError, "run nowhere does not exist"),
        (["nowhere"], {"table": [["a", "b"], ["c"]]}, ValueError, "rows of one length"),
        (["nowhere"], {"table": []}, ValueError, "rows of one length"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, runs, keywords, error, sentence):
    with pytest.raises(error, match=sentence):
        write_report(runs, tmp_path / "page.html", **keywords)
