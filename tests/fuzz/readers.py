"""What reads files from elsewhere, given any bytes: it reads them, or says in one sentence why not.

``python -m tests.fuzz.readers TARGET [CORPUS or INPUT] [-max_total_time=600 ...]`` mutates the seeds below by what code
they reach, with atheris and libFuzzer's flags; test_fuzz.py mutates them blindly, a little, in every run of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

instrumented: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
if __name__ == "__main__":
    import atheris

    instrumented = atheris.instrument_imports(include=["modest_align_train", "tarfile", "csv"])
with instrumented:
    from modest_align_train import latents, tables
    from modest_align_train.adapters import load_checkpoint
    from modest_align_train.checkpoints import BEST, _checksum, named, write_checkpoint
    from modest_align_train.latents import MANIFEST, Record, load_latents, open_image, write_manifest, write_shard
    from modest_align_train.pictures import UnreadableError
    from modest_align_train.settings import Settings
    from modest_align_train.sources import read_source

# Emptied at the end of the process.
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
FOLDER = Path(_folder.name)


def _sentence(read: Callable[[], object]) -> str:
    """What is said of bytes that cannot be read; any other error is a finding."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        kind, said = type(error), str(error)
    else:
        return ""
    assert kind in (ValueError, FileNotFoundError), f"{kind} is no sentence of ours: {said}"
    assert "\n" not in said, said
    assert 0 < len(said) < 2000, said
    return said


def table(data: bytes) -> str:
    """A table: a byte that chooses its suffix, and its content."""
    path = FOLDER / f"t{list(tables.READERS)[data[0] % len(tables.READERS)]}"
    path.write_bytes(data[1:])
    return _sentence(lambda: read_source(path))


def webdataset(data: bytes) -> str:
    """A tar, whose checksums are made right."""
    content = bytearray(data)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    path = FOLDER / "t.tar"
    path.write_bytes(content)
    latents._tar_index.cache_clear()  # two files within one tick of the clock

    def read() -> None:
        for record in read_source(path).records:
            with contextlib.suppress(UnreadableError):
                open_image(record.location)

    return _sentence(read)


def manifest(data: bytes) -> str:
    """A folder of latents: a byte that chooses the file, and its content, to which the checksums are adapted."""
    folder = FOLDER / "latents"
    if not folder.is_dir():
        _write_latents(folder)
    name = (MANIFEST, "shard-00000.jsonl", "shard-00000.safetensors")[data[0] % 3]
    shutil.copytree(folder, FOLDER / "changed", dirs_exist_ok=True)
    (FOLDER / "changed" / name).write_bytes(data[1:])
    if name != MANIFEST:
        changed = json.loads((folder / MANIFEST).read_text())
        changed["shards"][0]["sha256"][name] = hashlib.sha256(data[1:]).hexdigest()
        (FOLDER / "changed" / MANIFEST).write_text(json.dumps(changed))
    return _sentence(lambda: load_latents(FOLDER / "changed"))


def checkpoint(data: bytes) -> str:
    """A run's best checkpoint, whose checksum is made right: a byte that chooses, and all of it or its three parts."""
    run = FOLDER / "run"
    if not run.is_dir():
        _write_run(run)
    content = bytearray(data[1:])
    if data[0] % 2:
        facts, places, numbers = (*data[1:].split(b"\n", 2), b"", b"")[:3]
        metadata = {"checkpoint": f'{{"sha256": "{"0" * 64}", "facts": {facts.decode(errors="replace")}}}'}
        header = json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()[:-1] + b"," + places
        content = bytearray(len(header).to_bytes(8, "little") + header + numbers)
    with contextlib.suppress(ValueError):
        start, end, digest = _checksum(content)
        content[start:end] = digest.encode()
    (run / BEST).write_bytes(content)
    return _sentence(lambda: load_checkpoint(run))


def _write_latents(folder: Path) -> None:
    folder.mkdir()
    records = [Record(f"{i}", ("a", "b")[: 1 + i], "train", f"{i}", f"{i}.png") for i in range(2)]
    shard = write_shard(folder, 0, torch.ones(2, 3), torch.ones(3, 2), torch.tensor([0, 1, 1]), records)
    write_manifest(folder, [shard], image_encoder="eyes", text_encoder="ears", image_dim=3, text_dim=2)


def _write_run(run: Path) -> None:
    from modest_align_train.adapters import Aligner

    run.mkdir()
    settings = Settings(latents=Path("latents"), output=run, embedding_dim=2, blocks=0)
    (run / "settings.toml").write_text(settings.to_toml())
    state = named("model", Aligner(3, 2, settings).state_dict())
    write_checkpoint(run / BEST, {"step": 3, "latents": "a", "image_dim": 3, "text_dim": 2, **state})


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("../up.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file.getvalue().rstrip(b"\0") + bytes(1024)


def seeds(target: str) -> list[bytes]:
    """Small inputs that are read."""
    if target == "table":
        coco = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"id": 2, "image_id": 1, "caption": "one"}],
        }
        karpathy = {"filepath": "f", "filename": "a.png", "split": "train", "sentences": [{"raw": "one"}]}
        rows = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "caption": ["x", "y"]}]
        contents = {
            ".csv": 'image,caption,split\na.png,"one, ""two""",train\nb.png,"[\'x\', \'y\']",val\n',
            ".tsv": "image\tcaption\na.png\tone\n",
            ".txt": "sep=|\nimage|comment\na.png#0| one\n",
            ".jsonl": "\n".join(map(json.dumps, rows)),
            ".json": json.dumps(rows),
        }
        suffixes = list(tables.READERS)
        found = [bytes([suffixes.index(suffix)]) + content.encode() for suffix, content in contents.items()]
        with contextlib.suppress(ImportError):
            import pyarrow.parquet

            file = io.BytesIO()
            images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "b.png"}]
            pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": ["one", "two"]}), file)
            found.append(bytes([suffixes.index(".parquet")]) + file.getvalue())
        json_byte = bytes([suffixes.index(".json")])
        return found + [json_byte + json.dumps(one).encode() for one in (coco, {"images": [karpathy]})]
    if target == "webdataset":
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, "PNG")
        fields = json.dumps({"caption": "one", "group": 3}).encode()
        members = {"a.png": file.getvalue(), "a.txt": b"one\ntwo", "b.v1.png": b"", "b.json": fields}
        return [_tar(members), _tar({"é" * 60 + ".png": file.getvalue(), "é" * 60 + ".txt": b"x"})]
    if target == "manifest":
        manifest(b"\0")
        names = (MANIFEST, "shard-00000.jsonl", "shard-00000.safetensors")
        return [bytes([i]) + (FOLDER / "latents" / name).read_bytes() for i, name in enumerate(names)]
    checkpoint(b"\0")
    _write_run(FOLDER / "seed")
    content = (FOLDER / "seed" / BEST).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    facts = json.loads(header.pop("__metadata__")["checkpoint"])["facts"]
    return [
        b"\0" + content,
        b"\1" + json.dumps(facts).encode() + b"\n" + json.dumps(header).encode()[1:] + b"\n" + content[end:],
    ]


TARGETS = {one.__name__: one for one in (table, webdataset, manifest, checkpoint)}

if __name__ == "__main__":
    target = sys.argv.pop(1)
    if not re.fullmatch("|".join(TARGETS), target):
        sys.exit(f"target must be one of {', '.join(TARGETS)}, got {target}")
    corpus = FOLDER / "seeds"
    corpus.mkdir()
    for number, seed in enumerate(seeds(target)):
        (corpus / str(number)).write_bytes(seed)

    def run_one(data: bytes) -> None:
        if data:
            TARGETS[target](data)

    one_input = any(Path(word).is_file() for word in sys.argv[1:])
    atheris.Setup([*sys.argv, *[str(corpus)][one_input:], "-rss_limit_mb=4096", "-timeout=30"], run_one)
    atheris.Fuzz()
