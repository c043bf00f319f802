"""The shipped demo pairs as they are committed, and the pure functions of the script that builds them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from tools import build_demo_data as script

DATA = Path(__file__).parents[1] / "python" / "modest_align_train" / "demo_data"


@pytest.fixture(scope="module")
def manifest():
    return json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def samples(manifest):
    """{key: (shard's name, WebP bytes, fields)} of every committed sample."""
    found = {}
    for shard in manifest["shards"]:
        with tarfile.open(DATA / shard["name"]) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        assert len(members) == 2 * shard["images"]
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                assert key not in found
                found[key] = (shard["name"], members[f"{key}.webp"], json.loads(data))
    return found


class TestCommitted:
    def test_shards_are_those_of_the_manifest(self, manifest):
        assert {path.name for path in DATA.glob("*.tar")} == {shard["name"] for shard in manifest["shards"]}
        for shard in manifest["shards"]:
            data = (DATA / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])

    def test_fits_into_20_mb(self):
        assert sum(path.stat().st_size for path in DATA.iterdir() if path.is_file()) <= 20_000_000

    def test_images_decode(self, samples):
        for key, (_, webp, _) in samples.items():
            with Image.open(io.BytesIO(webp)) as image:
                image.load()
                assert (image.format, image.mode) == ("WEBP", "RGB"), key
                assert max(image.size) <= 160, key
                assert max(high - low for low, high in image.getextrema()) >= 16, f"{key} is blank"

    def test_fields(self, samples):
        for key, (shard, _, fields) in samples.items():
            assert list(fields) == ["captions", "group", "split", "source", "license"], key
            assert fields["license"] == script.LICENSES[fields["source"]], key
            assert key.startswith(fields["source"] + "-"), key
            assert "." not in key, "WebDataset would cut the key there"
            assert shard.startswith(fields["split"] + "-"), key
            captions = fields["captions"]
            assert captions, key
            assert len(set(captions)) == len(captions), key
            for caption in captions:
                assert caption.strip() == caption != "", key
                assert not any(mark in caption for mark in ("</", "://", "HASH(")), key

    def test_groups_are_normalised_names_on_one_side(self, samples):
        splits = defaultdict(set)
        for key, (_, _, fields) in samples.items():
            assert fields["group"] == script.concept(fields["captions"][0]), key
            splits[fields["group"]].add(fields["split"])
        assert all(split == {script.split_of(group)} for group, split in splits.items())
        share = Counter(next(iter(split)) for split in splits.values())
        for split, wanted in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            assert share[split] / len(splits) == pytest.approx(wanted, abs=0.025)

    def test_no_image_comes_twice(self, samples):
        assert len({webp for _, webp, _ in samples.values()}) == len(samples)

    def test_a_thing_drawn_by_several_sources_is_one_group(self, samples):
        sources = defaultdict(set)
        for _, _, fields in samples.values():
            sources[fields["group"]].add(fields["source"])
        assert {"openclipart"} < sources["banana"]

    def test_counts_in_the_manifest(self, manifest, samples):
        images = Counter((fields["source"], fields["split"]) for _, _, fields in samples.values())
        for source, facts in manifest["sources"].items():
            assert facts["images"] == {split: images[source, split] for split in facts["images"]}
        assert manifest["images"] == len(samples) == images.total()
        assert manifest["captions"] == sum(len(fields["captions"]) for _, _, fields in samples.values())
        groups = {(fields["split"], fields["group"]) for _, _, fields in samples.values()}
        assert manifest["groups"] == dict(Counter(split for split, _ in groups))

    def test_was_built_by_this_script(self, manifest):
        assert manifest["versions"] == script.VERSIONS
        assert manifest["split_rule"]["salt"] == script.SALT
        assert [package["sha256"] for package in manifest["packages"].values()] == [
            package.sha256 for package in script.PACKAGES.values()
        ]

    def test_licenses_name_every_source(self, manifest):
        text = (DATA / "LICENSES.md").read_text(encoding="utf-8")
        for source in manifest["sources"]:
            assert f"## {source}: " in text
        for package in script.PACKAGES.values():
            assert f"`{package.name}` {package.version}" in text


class TestNames:
    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("Cat", "cat"),
            ("cat_02", "cat"),
            ("Blue Man#101", "blue man"),
            ("T-shirt", "t shirt"),
            ("Château-fort 1", "chateau fort"),
            ("three o’clock", "three oclock"),
            ("1st place medal", "1st place medal"),
            ("baloon2", "baloon"),
            ("  Ice Cream Cone (3 scoop) ", "ice cream cone scoop"),
            ("007", ""),
        ],
    )
    def test_concept(self, name, group):
        assert script.concept(name) == group
        assert script.concept(group) == group

    @pytest.mark.parametrize(
        ("title", "stem", "creator", "name"),
        [
            ("Pop Can", "pop_can_gerald_g_01", "Gerald G.", "Pop Can"),
            ("Clipart by Nicu Buculei - pear", "banana", "", "banana"),
            ("AIGA_Symbol_Signs", "aiga_baggage_check_in1", "", "baggage check in"),
            ("Clipart by Nicu Buculei - contour_chipmunk", "contour_fox", "", "fox"),
            ("R16 sibmission", "pancakes_berries_bw", "", "pancakes berries"),
            ("advertising", "BasseTemperature", "", "Basse Temperature"),
            ("advertising board", "board_01", "", "advertising board"),
            ("Map Symbols", "car_0_symbol_10cm_bwh", "", "car"),
            ("tree - RPG map elements", "tree_-_rpg_01", "", "tree"),
            ("books-aj.svg", "books-aj_svg_aj_ashton_01", "", "books"),
            ("Chalet Jane Doe", "chalet_01", "Jane Doe", "Chalet"),
            ("Jane Doe", "jane_doe_01", "Jane Doe", ""),
            ("Croissant (B &amp; W)", "croissant", "", "Croissant (B & W)"),
            ("AfricanDrum", "africandrum_01", "", "African Drum"),
        ],
    )
    def test_clipart_name(self, title, stem, creator, name):
        assert script.clipart_name(title, stem, creator) == name

    def test_plain_hexcode(self):
        assert script.plain_hexcode("1F6A3-200D-2642-FE0F") == "1f6a3-200d-2642"

    def test_split_depends_on_the_name_alone(self):
        names = [f"thing {n}" for n in range(4000)]
        share = Counter(map(script.split_of, names))
        for split, wanted in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            assert share[split] / len(names) == pytest.approx(wanted, abs=0.02)
        # Written down: a change of rule or salt would silently move test images into somebody's training set.
        as_released = {"cat": "train", "banana": "test", "scissors": "train", "rocket": "train"}
        assert {name: script.split_of(name) for name in as_released} == as_released


class TestCaptions:
    def test_name_keywords_description(self):
        captions = script.clipart_captions(
            "Pop Can",
            ["food", "pop_can", "HASH(0x8a0a540)", "unsorted", "11", "Food", "soft drink"],
            "A tin.",
            "",
        )
        assert captions == ("Pop Can", "Pop Can: food, soft drink", "A tin.")

    @pytest.mark.parametrize(
        "description",
        [
            "",
            "pop can",
            "Jane Doe",
            "EPS converted from  http://aiga.org",
            "jane@example.org",
            "Made with Sodipodi",
            "<b>A can</b>",
            "HASH(0x8677e2c)",
            "x" * 201,
        ],
    )
    def test_descriptions_that_say_nothing(self, description):
        assert script.clipart_captions("Pop Can", ["jane doe"], description, "Jane Doe") == ("Pop Can",)

    def test_a_long_description_is_cut_to_its_first_sentence(self):
        description = "A red can. " + "It is very red. " * 20
        assert script.clipart_captions("Pop Can", [], description, "")[1:] == ("A red can.",)


class TestLeftOut:
    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ({"group": 9, "subgroup": 98}, "flag"),
            ({"group": 8, "subgroup": 94}, "keycap"),
            ({"group": 8, "subgroup": 95}, "letter or word in a box"),
            ({"group": 2, "subgroup": 32}, "skin or hair component"),
            ({"label": "regional indicator A"}, "regional letter"),
            ({"group": 3, "subgroup": 34}, None),
        ],
    )
    def test_emoji(self, entry, reason):
        assert script.emoji_dropped(entry) == reason

    @pytest.mark.parametrize(
        ("path", "title", "reason"),
        [
            ("shapes/stars/star_01.svg", "gramastar", "shape, arrow, jigsaw piece or star"),
            ("computer/icons/flat-theme/a.svg", "printer", "icon theme or button"),
            ("computer/home1.svg", "Lemon SVG theme", "icon theme or button"),
            ("signs_and_symbols/flags/asia/japan.svg", "Japan", "flag"),
            ("geography/sweden.svg", "Flag of Sweden", "flag"),
            ("recreation/games/cards/white/a.svg", "card", "playing card"),
            ("signs_and_symbols/clocks/c.svg", "clock12", "clock face"),
            ("animals/cat.svg", "gatto", None),
            ("food/flagon.svg", "flagon", None),
            ("computer/hardware/mouse.svg", "mouse", None),
        ],
    )
    def test_clipart(self, path, title, reason):
        assert script.clipart_dropped(path, title, "http://web.resource.org/cc/PublicDomain") == reason

    @pytest.mark.parametrize("url", ["", "http://creativecommons.org/licenses/GPL/2.0/", "CC-BY"])
    def test_other_licences(self, url):
        assert script.clipart_dropped("animals/cat.svg", "cat", url) == "states another licence or none"
        assert script.clipart_dropped("a.svg", "", "http://creativecommons.org/licenses/publicdomain/") is None


def clipart(body: str, title: str = "Red Ball", license_url: str = "http://web.resource.org/cc/PublicDomain") -> bytes:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="400"
        height="400"><metadata><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
        xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work>
        <dc:title>{title}</dc:title><dc:description>A ball on the floor.</dc:description>
        <dc:subject><rdf:Bag><rdf:li>toy</rdf:li><rdf:li></rdf:li><rdf:li>red_ball</rdf:li></rdf:Bag></dc:subject>
        <dc:publisher><cc:Agent><dc:title>Open Clip Art Project</dc:title></cc:Agent></dc:publisher>
        <dc:creator><cc:Agent><dc:title>Jane Doe</dc:title></cc:Agent></dc:creator>
        <cc:license rdf:resource="{license_url}"/></cc:Work></rdf:RDF></metadata>{body}</svg>""".encode()


class TestClipartFile:
    def test_reads_the_metadata(self):
        drawing = script.clipart_drawing("recreation/toys/ball_v1.2.svg", clipart("<circle r='9'/>"))
        assert drawing.key == "openclipart-recreation-toys-ball_v1_2"
        assert drawing.group == "red ball"
        assert drawing.captions == ("Red Ball", "Red Ball: toy", "A ball on the floor.")
        assert json.loads(drawing.sidecar()) == {
            "captions": list(drawing.captions),
            "group": "red ball",
            "split": script.split_of("red ball"),
            "source": "openclipart",
            "license": "public domain",
        }

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (clipart("<text>STOP</text>"), "holds text"),
            (clipart("<image xlink:href='C:\\photo.png'/>"), "links an image"),
            (clipart("", title="12"), "has no name"),
            (
                clipart("", license_url="http://creativecommons.org/licenses/by/2.0/"),
                "states another licence",
            ),
            (b"<svg>", "cannot be parsed"),
        ],
    )
    def test_leaves_out(self, data, reason):
        assert script.clipart_drawing("recreation/toys/ball.svg", data).startswith(reason)

    def test_empty_text_and_embedded_images_are_fine(self):
        data = clipart("<text> </text><image xlink:href='data:image/png;base64,AA'/>")
        assert isinstance(script.clipart_drawing("recreation/toys/ball.svg", data), script.Drawing)


class TestPicture:
    pytestmark = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")

    def svg(self, body: str) -> str:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="400">{body}</svg>'

    def test_crops_to_what_is_shown_and_fits(self):
        image = script.picture(self.svg('<ellipse cx="300" cy="20" rx="16" ry="8" fill="red"/>'))
        assert (image.mode, image.size) == ("RGB", (script.SIDE, script.SIDE))
        middle = script.SIDE // 2
        assert image.getpixel((middle, middle)) == (255, 0, 0)
        assert image.getpixel((script.MARGIN + 4, middle)) == (255, 0, 0)  # as wide as the margin lets it
        assert image.getpixel((script.MARGIN - 1, middle)) == (255, 255, 255)
        assert image.getpixel((middle, middle // 2 - 4)) == (255, 255, 255)  # half as high as wide

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("", "is blank on white"),
            ('<circle cx="200" cy="200" r="90" fill="white"/>', "is blank on white"),
            ('<rect width="400" height="400" fill="navy"/>', "is one colour"),
        ],
    )
    def test_nothing_to_see(self, body, reason):
        with pytest.raises(script.UnusableDrawing, match=reason):
            script.picture(self.svg(body))

    def test_what_the_renderer_refuses(self):
        with pytest.raises(script.UnusableDrawing, match="cannot be rendered"):
            script.picture("<svg")


def drawing(key: str, group: str = "thing") -> object:
    return script.Drawing(key, "openclipart", group, (group,), "")


class TestFiles:
    def test_tar_has_no_time_and_no_owner(self):
        data = script.tar_of([(drawing("a"), b"webp"), (drawing("b"), b"x" * 600)])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = archive.getmembers()
        assert [member.name for member in members] == ["a.webp", "a.json", "b.webp", "b.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}

    def test_shards_hold_everything_in_order_and_stay_small(self, monkeypatch):
        monkeypatch.setattr(script, "SHARD_BYTES", 10_000)
        samples = [(drawing(f"k{n}"), bytes(n * 40)) for n in range(40)]
        shards = script.shards_of(samples)
        assert [sample for shard in shards for sample in shard] == samples
        assert len(shards) > 2
        # tar pads each file to whole records of 10,240 bytes, and ends it with two blocks
        assert all(len(script.tar_of(shard)) <= 20_480 for shard in shards)

    def test_write_then_compare(self, tmp_path):
        tar = script.tar_of([(drawing("a"), b"one"), (drawing("b"), b"two")])
        files = {"train-00000.tar": tar, "LICENSES.md": b"text", "manifest.json": b"{}"}
        (tmp_path / "train-00001.tar").write_bytes(b"of an earlier build")
        script.write(files, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == set(files)
        assert script.first_difference(files, tmp_path) is None

        other = script.tar_of([(drawing("a"), b"one"), (drawing("b"), b"TWO")])
        found = script.first_difference({**files, "train-00000.tar": other}, tmp_path)
        assert found == "train-00000.tar differs in b.webp"
        found = script.first_difference({**files, "manifest.json": b"{ }"}, tmp_path)
        assert found == "manifest.json differs from byte 1 on (2 bytes there, 3 built)"
        found = script.first_difference({"manifest.json": b"{}"}, tmp_path)
        assert found == "train-00000.tar is there and is not built"
        (tmp_path / "LICENSES.md").unlink()
        assert script.first_difference(files, tmp_path) == "LICENSES.md is built and is not there"


class TestSentences:
    def run(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    @pytest.fixture
    def any_version(self, monkeypatch):
        monkeypatch.setattr(script, "VERSIONS", {})

    def test_other_version(self, monkeypatch):
        monkeypatch.setattr(script, "VERSIONS", {"pillow": "0.1"})
        assert "is installed; the demo data are built with pillow 0.1" in self.run()
        monkeypatch.setattr(script, "VERSIONS", {"no-such-package": "0.1"})
        assert "no-such-package is not installed; the demo data are" in self.run()

    @pytest.mark.usefixtures("any_version")
    def test_missing_source(self, tmp_path):
        assert self.run("--sources", str(tmp_path)).endswith("is missing: it is @iconify-json/noto 1.2.9")

    @pytest.mark.usefixtures("any_version")
    def test_other_checksum(self, tmp_path):
        (tmp_path / script.PACKAGES["noto"].file).write_bytes(b"other")
        wanted = script.PACKAGES["noto"].sha256
        assert self.run("--sources", str(tmp_path)).endswith(f"; wanted is {wanted}")

    @pytest.mark.usefixtures("any_version")
    def test_missing_npm(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda command: None)
        assert "npm is not installed: it downloads @iconify-json/noto; or put" in self.run()
