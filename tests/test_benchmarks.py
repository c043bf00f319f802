"""Each benchmark once, tiny, so that none rots; and README's blocks are what the stored results say."""

from __future__ import annotations

import json

from benchmarks import __main__ as benchmarks
from benchmarks import readme


def test_side_by_side(tmp_path, capsys) -> None:
    output = tmp_path / "result.json"
    benchmarks.main(["--rows", "32", "48", "--features", "8", "--rounds", "2", "--output", str(output)])
    stored = json.loads(output.read_text())
    assert [case["rows"] for case in stored["cases"]] == [32, 48]
    assert output.with_suffix(".png").stat().st_size > 10_000
    for case in stored["cases"]:
        assert case["results"]["ours (eager)"]["worst_row_error"] < 1e-4
        assert set(case["results"]) >= {"floor", "plain", "ours (eager)"}
        for result in case["results"].values():
            assert 0 < result["seconds_low"] <= result["seconds"] <= result["seconds_high"]
        assert case["results"]["plain"]["ratio_to_plain"] == 1
    stored["cases"][0]["results"]["plain"] = {"failed": "out of memory"}
    assert "| plain | out of memory |" in benchmarks.table(stored["cases"])
    printed = capsys.readouterr().out
    assert printed.count("| ours (eager) |") == 2
    assert {"torch", "commit", "device"} <= set(stored["machine"])


def test_readme_shows_the_stored_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "run `make readme`"
