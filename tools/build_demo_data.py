"""Rebuild the demo's image-caption pairs, bit for bit, from the packages they come from.

    python tools/build_demo_data.py            # download, build, write modest_align_train/demo_data
    python tools/build_demo_data.py --check    # build again and compare with what is committed

The emoji come from npm packages, Open Clip Art from a Debian package; `npm pack`, `apt-get download` and
`dpkg-deb` fetch and open them (`--sources DIR` takes files that are there already). Each SVG is drawn by
resvg on white, cropped to what it shows, fitted into a square and stored as WebP in plain tar shards in the
WebDataset convention: `KEY.webp` and `KEY.json`. What is left out, and why, stands in the tables below and is
counted in the manifest.

The same bytes come out only with the pinned renderer, Pillow and libwebp: they are checked first.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps, features
from tqdm import tqdm

from modest_align_train.files import write_file

OUTPUT = Path(__file__).parents[1] / "python" / "modest_align_train" / "demo_data"
VERSIONS = {"resvg_py": "0.5.0", "pillow": "13.0.0", "libwebp": "1.6.0"}

SIDE = 128  # pixels of the square image
MARGIN = 4  # white pixels on each of its sides
QUALITY = 75  # of WebP
SHARD_BYTES = 4_800_000  # a new shard begins before its members exceed this
DRAWINGS_PER_EMOJI = 2  # of the three emoji sets; all three would not fit into 20 MB
SALT = "modest-align-demo-1"  # changing it deals the concepts anew
SPLITS = (("train", 0.7), ("validation", 0.8), ("test", 1.0))  # upper ends of the hash's range


@dataclass(frozen=True)
class Package:
    """A package that the data come from, pinned by version and checksum."""

    manager: str
    name: str
    version: str
    file: str
    sha256: str


PACKAGES = {
    "noto": Package(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "fluent": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "twemoji": Package(
        "npm",
        "@twemoji/svg",
        "15.0.0",
        "twemoji-svg-15.0.0.tgz",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
    ),
    "emojibase": Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "openclipart": Package(
        "apt",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
}

LICENSES = {"noto": "Apache-2.0", "fluent": "MIT", "twemoji": "CC-BY-4.0", "openclipart": "public domain"}

# Emojibase's numbers for what is no picture of a thing: (field, number) -> reason.
EMOJI_DROPPED = {
    ("group", None): "regional letter",
    ("group", 2): "skin or hair component",
    ("group", 9): "flag",
    ("subgroup", 94): "keycap",
    ("subgroup", 95): "letter or word in a box",
}

# Clip art left out: (reason, what is looked at, pattern). The first rule that matches counts.
CLIPART_DROPPED = (
    ("shape, arrow, jigsaw piece or star", "path", r"shapes/"),
    ("shape, arrow, jigsaw piece or star", "title", r"(?i).*\b(star rating|zero stars)"),
    ("icon theme or button", "path", r"(computer/(icons|buttons)|buttons)/"),
    (
        "icon theme or button",
        "title",
        r"Part of the Flat Icon|Lemon SVG theme|gold-theme|plastik-icon|blueberry",
    ),
    ("pattern, gradient or page layout", "path", r"special/"),
    (
        "pattern, gradient or page layout",
        "title",
        r"Menu Clip Art Collection Example|Font Samples|crop marks",
    ),
    ("flag", "path", r"signs_and_symbols/flags/"),
    ("flag", "title", r"(?i).*\bflags?\b"),
    ("playing card", "path", r"recreation/games/cards/"),
    ("clock face", "path", r"signs_and_symbols/clocks/"),
    ("LED digit", "path", r"signs_and_symbols/led/"),
    ("unfit for a demo", "title", r"(?i).*\b(sexy|stripper|hide.girl|pantyhose)"),
    (
        "states another licence or none",
        "path",
        r"animals/mammals/big_cats/tiger_graig_ryan_smith",
    ),  # LGPL inside
)

# Titles that name the collection a drawing was published in: such a drawing goes by its file's name.
COLLECTION_TITLE = re.compile(
    r"Clipart by Nicu Buculei|AIGA_Symbol_Signs|Various Cliparts|SVG Road Signs|Road Signs|Etiquette Icons"
    r"|R16 sib|Australian Maps|advertising$|Map Symbols|Sallite|Homes Clipart|balloons-aj|Chess pieces"
    r"|PC connectors|people$|moons$"
)
COLLECTION_AFFIX = re.compile(r"^(aiga|contour|sport|svg|chesspieces)[_-]|[_-](\d_symbol_.*|bw|zazou|aj)$")
SERIES_SUFFIX = re.compile(r"\s*(- (RPG map elements|body part|clothing)|(-aj)?\.svg|-aj|\(email.*\))$")

# The archive's own scripts left "HASH(0x...)" in keywords and descriptions.
KEYWORD_NOISE = re.compile(r"hash(\(.*\))?|0x[0-9a-f]+|unsorted|\d*|.*(@|://).*", re.IGNORECASE)
DESCRIPTION_NOISE = re.compile(
    r"://|www\.|@|<|hash\(|e-?mail|public domain|inkscape|sodipodi|clip ?art"
    r"|\b(converted|derived|derivative|extracted)\b|\b(created|made|drawn) (with|in|by|using)\b",
    re.IGNORECASE,
)
LONGEST_DESCRIPTION = 200  # characters


@dataclass(frozen=True)
class Drawing:
    """One SVG with what is said about it."""

    key: str
    source: str
    group: str
    captions: tuple[str, ...]
    svg: str

    @property
    def split(self) -> str:
        """The side that the drawing's concept is on."""
        return split_of(self.group)

    def sidecar(self) -> bytes:
        """The bytes of the sample's `.json`."""
        fields = {
            "captions": self.captions,
            "group": self.group,
            "split": self.split,
            "source": self.source,
            "license": LICENSES[self.source],
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


class UnusableDrawing(Exception):  # noqa: N818
    """A drawing that gives no picture; the message is the reason that the manifest counts."""


def concept(name: str) -> str:
    """Normalises a name so that drawings of one thing share it: lower case, no accents, no counters."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(c for c in letters if not unicodedata.combining(c))
    letters = re.sub(r"['’]", "", letters)
    return " ".join(re.sub(r"\d+(?![^\W\d_])|[\W_]", " ", letters).split())


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone."""
    return int(hashlib.sha256(f"{SALT}/{text}".encode()).hexdigest()[:13], 16) / 16**13


def split_of(group: str) -> str:
    """The split of a concept; it stays when other concepts come or go."""
    return next(split for split, end in SPLITS if fraction(group) < end)


def plain_hexcode(hexcode: str) -> str:
    """An emoji's code points in lower case without U+FE0F, which the packages write or omit at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def clipart_name(title: str, stem: str, creator: str) -> str:
    """What the drawing is called: its title, or its file's name where the title is a collection's."""
    title = " ".join(html.unescape(title).split())
    if COLLECTION_TITLE.match(title):
        name = COLLECTION_AFFIX.sub("", COLLECTION_AFFIX.sub("", stem.strip("_")))
        name = re.sub(r"[\d_]+$", "", name).replace("-", " ")
    else:
        name = SERIES_SUFFIX.sub("", title)
        name = name.removesuffix(creator) if creator else name
    name = name.replace("_", " ")
    if " " not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return " ".join(name.split())


def clipart_captions(name: str, keywords: Iterable[str], description: str, creator: str) -> tuple[str, ...]:
    """The name, the name with its keywords, the description: those that add something, best first."""
    words: list[str] = []
    for keyword in keywords:
        word = " ".join(html.unescape(keyword).replace("_", " ").split())
        known = [concept(other) for other in (name, creator, *words)]
        if not KEYWORD_NOISE.fullmatch(word) and concept(word) not in known:
            words.append(word)
    captions = [name]
    if words:
        captions.append(f"{name}: {', '.join(words)}")
    description = " ".join(html.unescape(description).split())
    if len(description) > LONGEST_DESCRIPTION:
        description = re.split(r"(?<=[.!?])\s", description)[0]
    is_news = concept(description) not in ("", concept(name), concept(creator))
    if is_news and len(description) <= LONGEST_DESCRIPTION and not DESCRIPTION_NOISE.search(description):
        captions.append(description)
    return tuple(captions)


def emoji_dropped(entry: dict[str, Any]) -> str | None:
    """The reason an emoji is left out, or None."""
    reasons = (EMOJI_DROPPED.get((field, entry.get(field))) for field in ("group", "subgroup"))
    return next((reason for reason in reasons if reason), None)


def clipart_dropped(path: str, title: str, license_url: str) -> str | None:
    """The reason a clip art file is left out, or None."""
    if not re.search(r"(?i)/publicdomain/?$", license_url):
        return "states another licence or none"
    looked_at = {"path": path, "title": title}
    return next((why for why, field, pattern in CLIPART_DROPPED if re.match(pattern, looked_at[field])), None)


def emoji_drawings(sources: Path, dropped: dict[str, Counter[str]]) -> Iterator[Drawing]:
    """Yields the emoji: for each concept the drawings of two of the three sets, which two by a hash."""
    svgs = {source: iconify_svgs(sources / PACKAGES[source].file) for source in ("noto", "fluent")}
    members = npm_members(sources / PACKAGES["twemoji"].file, ".svg")
    svgs["twemoji"] = {plain_hexcode(Path(name).stem): data.decode() for name, data in members.items()}
    data = npm_members(sources / PACKAGES["emojibase"].file, "package/en/data.json")
    entries = json.loads(data["package/en/data.json"])
    for entry in sorted(entries, key=lambda entry: entry["hexcode"]):
        code = plain_hexcode(entry["hexcode"])
        having = sorted((s for s in svgs if code in svgs[s]), key=lambda s: fraction(f"{code}/{s}"))
        reason = emoji_dropped(entry)
        kept = [] if reason else sorted(having[:DRAWINGS_PER_EMOJI])
        for source in having:
            if source not in kept:
                dropped[source][reason or f"concept has {DRAWINGS_PER_EMOJI} drawings already"] += 1
        label, tags = entry["label"], entry.get("tags", [])
        captions = (label, f"{label}: {', '.join(tags)}") if tags else (label,)
        for source in kept:
            yield Drawing(f"{source}-{code}", source, concept(label), captions, svgs[source][code])


def iconify_svgs(package: Path) -> dict[str, str]:
    """The drawings of an Iconify package as {hexcode: SVG}."""
    members = npm_members(package, "package/icons.json", "package/chars.json")
    icons, chars = (json.loads(members[f"package/{name}.json"]) for name in ("icons", "chars"))
    svgs = {}
    for hexcode, name in chars.items():
        icon = {"width": icons["width"], "height": icons["height"], **icons["icons"][name]}
        svgs[plain_hexcode(hexcode)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {icon["width"]} {icon["height"]}">{icon["body"]}</svg>'
        )
    return svgs


def npm_members(package: Path, *suffixes: str) -> dict[str, bytes]:
    """The members of an npm package whose names end so, as {name: bytes}."""
    with tarfile.open(package, "r:gz") as archive:
        return {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and member.name.endswith(suffixes)
        }


def clipart_drawings(sources: Path, dropped: dict[str, Counter[str]]) -> Iterator[Drawing]:
    """Yields the clip art that no rule leaves out."""
    package = sources / PACKAGES["openclipart"].file
    root = "./usr/share/openclipart/svg/"
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        # Links are left out: they put one drawing into several folders.
        files = {
            member.name.removeprefix(root): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and member.name.startswith(root) and member.name.endswith(".svg")
        }
    for path, data in sorted(files.items()):
        drawing = clipart_drawing(path, data)
        if isinstance(drawing, Drawing):
            yield drawing
        else:
            dropped["openclipart"][drawing] += 1


def clipart_drawing(path: str, data: bytes) -> Drawing | str:
    """Reads one clip art file: the drawing, or the reason why it is left out."""
    try:
        root = ElementTree.fromstring(data)
        svg = data.decode()
    except (ElementTree.ParseError, UnicodeDecodeError):
        return "cannot be parsed"
    facts = {local_name(fact): fact for work in root.iter() if local_name(work) == "Work" for fact in work}
    title, description, creator = (" ".join(all_text(facts.get(k))) for k in ("title", "description", "creator"))
    license_urls = [*facts["license"].attrib.values(), ""] if "license" in facts else [""]
    reason = clipart_dropped(path, title, license_urls[0])
    if reason:
        return reason
    for element in root.iter():
        kind = local_name(element)
        if kind in ("text", "flowRoot") and all_text(element):
            return "holds text, which would look as the machine's fonts do"
        href = element.get("{http://www.w3.org/1999/xlink}href", "")
        if kind == "image" and not href.startswith("data:"):
            return "links an image that is not there"
    name = clipart_name(title, Path(path).stem, creator)
    if len(concept(name)) < 2:
        return "has no name"
    subject = facts.get("subject")
    keywords = [] if subject is None else all_text(subject)
    key = "openclipart-" + re.sub(r"[^A-Za-z0-9_-]", "_", path.removesuffix(".svg").replace("/", "-"))
    captions = clipart_captions(name, keywords, description, creator)
    return Drawing(key, "openclipart", concept(name), captions, svg)


def local_name(element: ElementTree.Element) -> str:
    """An element's name without its namespace."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def all_text(element: ElementTree.Element | None) -> list[str]:
    """The non-blank texts inside an element, in document order."""
    return [] if element is None else [text.strip() for text in element.itertext() if text.strip()]


def picture(svg: str) -> Image.Image:
    """Draws an SVG, cropped to what it shows, into a white square of `SIDE` pixels, RGB.

    Raises:
        UnusableDrawing: the renderer refuses the SVG, or nothing is to be seen.
    """
    content = content_of(svg, width=256)
    if max(content.size) < SIDE:  # a small drawing on a large page: draw it again, larger
        content = content_of(svg, width=min(4096, 256 * 256 // max(content.size)))
    if max(high - low for low, high in content.getextrema()) < 16:
        raise UnusableDrawing("is one colour")
    inner = SIDE - 2 * MARGIN
    return ImageOps.expand(ImageOps.pad(content, (inner, inner), color="white"), MARGIN, "white")


def content_of(svg: str, width: int) -> Image.Image:
    """The drawing on white at a page width in pixels, cropped to what is not white."""
    import resvg_py  # here, so that its absence is told by require_versions

    try:
        # Without dpi a third of the clip art fails. System fonts would make the result depend on the machine.
        png = resvg_py.svg_to_bytes(svg_string=svg, width=width, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise UnusableDrawing("cannot be rendered") from error
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    page = page.convert("RGB")
    box = ImageChops.difference(page, Image.new("RGB", page.size, "white")).getbbox()
    if box is None:
        raise UnusableDrawing("is blank on white")
    return page.crop(box)


def build(sources: Path) -> dict[str, bytes]:
    """Builds everything in memory: {file name: bytes}, the manifest last."""
    dropped: dict[str, Counter[str]] = {source: Counter() for source in LICENSES}
    drawings = [*emoji_drawings(sources, dropped), *clipart_drawings(sources, dropped)]
    samples: list[tuple[Drawing, bytes]] = []
    seen: set[bytes] = set()
    failed: list[str] = []
    for drawing in tqdm(drawings, desc="render", unit=" images"):
        try:
            image = picture(drawing.svg)
            fingerprint = hashlib.sha256(image.tobytes()).digest()
            if fingerprint in seen:
                raise UnusableDrawing("looks exactly like an earlier one")
        except UnusableDrawing as reason:
            dropped[drawing.source][str(reason)] += 1
            if str(reason) == "cannot be rendered":
                failed.append(drawing.key)
            continue
        seen.add(fingerprint)
        webp = io.BytesIO()
        image.save(webp, "WEBP", quality=QUALITY, method=6)
        samples.append((drawing, webp.getvalue()))

    # Within a split the order is a hash's, so that each shard is a fair mix of the sources.
    samples.sort(key=lambda sample: fraction(sample[0].key))
    files: dict[str, bytes] = {}
    shards = []
    for split, _ in SPLITS:
        for number, part in enumerate(shards_of([sample for sample in samples if sample[0].split == split])):
            name = f"{split}-{number:05d}.tar"
            files[name] = tar_of(part)
            shards.append(
                {
                    "name": name,
                    "split": split,
                    "images": len(part),
                    "bytes": len(files[name]),
                    "sha256": hashlib.sha256(files[name]).hexdigest(),
                }
            )
    files["LICENSES.md"] = (OUTPUT / "LICENSES.md").read_bytes()  # written by hand
    manifest = manifest_of([drawing for drawing, _ in samples], dropped, failed, shards)
    files["manifest.json"] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def shards_of(samples: Sequence[tuple[Drawing, bytes]]) -> list[list[tuple[Drawing, bytes]]]:
    """Cuts the samples into runs of at most `SHARD_BYTES` as members of a tar."""
    shards: list[list[tuple[Drawing, bytes]]] = []
    room = 0
    for drawing, webp in samples:
        size = sum(512 + -(-len(data) // 512) * 512 for data in (webp, drawing.sidecar()))
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((drawing, webp))
        room -= size
    return shards


def tar_of(samples: Iterable[tuple[Drawing, bytes]]) -> bytes:
    """The samples as a tar without times or owners, so that equal samples give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for drawing, webp in samples:
            for suffix, data in (("webp", webp), ("json", drawing.sidecar())):
                member = tarfile.TarInfo(f"{drawing.key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def manifest_of(
    drawings: Sequence[Drawing],
    dropped: dict[str, Counter[str]],
    failed: list[str],
    shards: list[dict[str, Any]],
) -> dict[str, Any]:
    """What was built from what, and how much of it."""
    images = Counter((drawing.source, drawing.split) for drawing in drawings)
    groups: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        groups[drawing.split].add(drawing.group)
        groups[drawing.source].add(drawing.group)
    splits = [split for split, _ in SPLITS]
    return {
        "format": 1,
        "images": len(drawings),
        "captions": sum(len(drawing.captions) for drawing in drawings),
        "groups": {split: len(groups[split]) for split in splits},
        "sources": {
            source: {
                "license": LICENSES[source],
                "images": {split: images[source, split] for split in splits},
                "groups": len(groups[source]),
                "dropped": dict(sorted(dropped[source].items())),
            }
            for source in LICENSES
        },
        "render_failures": failed,
        "split_rule": {
            "unit": "group: the name in lower case without accents, punctuation, counters; over all sources",
            "fraction": "first 13 hexadecimal digits of sha256(salt + '/' + group), over 16**13",
            "salt": SALT,
            "below": dict(SPLITS),
        },
        "image": {"format": "WebP", "side": SIDE, "margin": MARGIN, "quality": QUALITY},
        "versions": VERSIONS,
        "packages": {
            f"{package.manager}:{package.name}": {"version": package.version, "sha256": package.sha256}
            for package in PACKAGES.values()
        },
        "shards": shards,
    }


def require_versions() -> None:
    """Refuses versions that would give other bytes."""
    for name, wanted in VERSIONS.items():
        try:
            found = features.version("webp") if name == "libwebp" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != wanted:
            is_there = f"{name} {found} is installed" if found else f"{name} is not installed"
            raise RuntimeError(f"{is_there}; the demo data are built with {name} {wanted}")


def fetch(package: Package, directory: Path) -> None:
    """Downloads a package with its manager's ordinary client."""
    command = {
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "apt": ["apt-get", "download", "--quiet", f"{package.name}={package.version}"],
    }[package.manager]
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"{command[0]} is not installed: it downloads {package.name}; "
            f"or put {package.file} into a folder and name that with --sources"
        )
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"`{' '.join(command)}` failed: {last}")


def require_sources(directory: Path) -> None:
    """Refuses a folder in which a package is missing or other than the pinned one."""
    for package in PACKAGES.values():
        path = directory / package.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: it is {package.name} {package.version}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            raise RuntimeError(f"{path} has SHA-256 {found}; wanted is {package.sha256}")
    if shutil.which("dpkg-deb") is None:
        raise RuntimeError("dpkg-deb is not installed: it opens the Debian package")


def write(files: dict[str, bytes], output: Path) -> None:
    """Puts each file in place by an atomic rename, then removes shards of an earlier build."""
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_file(output / name, data)
    for shard in output.glob("*.tar"):
        if shard.name not in files:
            shard.unlink()


def first_difference(files: dict[str, bytes], output: Path) -> str | None:
    """Where a folder first differs from the files built, in a clause; None if it does not."""
    for name in sorted(path.name for path in output.glob("*.tar")):
        if name not in files:
            return f"{name} is there and is not built"
    for name, data in files.items():
        path = output / name
        if not path.is_file():
            return f"{name} is built and is not there"
        there = path.read_bytes()
        if there == data:
            continue
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as new, tarfile.open(path) as old:
                for built, committed in zip(new, old, strict=False):
                    if built.name != committed.name:
                        return f"{name} has {committed.name} where {built.name} is built"
                    if new.extractfile(built).read() != old.extractfile(committed).read():  # type: ignore[union-attr]
                        return f"{name} differs in {built.name}"
        byte = next((i for i, (a, b) in enumerate(zip(there, data, strict=False)) if a != b), None)
        where = min(len(there), len(data)) if byte is None else byte
        return f"{name} differs from byte {where:,} on ({len(there):,} bytes there, {len(data):,} built)"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the data and writes them, or compares them with `--check`."""
    parser = argparse.ArgumentParser(description="Rebuild the demo's image-caption pairs from their packages.")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="folder with the packages; default: download")
    parser.add_argument("--output", type=Path, metavar="DIR", default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the output differs")
    options = parser.parse_args(arguments)
    try:
        require_versions()
        with tempfile.TemporaryDirectory() as temporary:
            sources = options.sources or Path(temporary)
            if options.sources is None:
                for package in tqdm(PACKAGES.values(), desc="download", unit=" packages"):
                    fetch(package, sources)
            require_sources(sources)
            files = build(sources)
    except (RuntimeError, FileNotFoundError) as error:
        sys.exit(f"build_demo_data: {error}")
    total = f"{len(files)} files, {sum(map(len, files.values())) / 1e6:.2f} MB"
    if options.check:
        difference = first_difference(files, options.output)
        if difference:
            sys.exit(f"build_demo_data: {options.output}: {difference}")
        print(f"{options.output} is what the script builds: {total}")
    else:
        write(files, options.output)
        print(f"{options.output}: {total}")


if __name__ == "__main__":
    main()
