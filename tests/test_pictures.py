"""Pictures as strangers have them: decoded as one sees them, or refused in a few words."""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from modest_align_train.pictures import UnreadableError, decode_picture

RED = (200, 30, 60)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red(kind, size=(16, 16), **options):
    return saved(Image.new("RGB", size, RED), kind, **options)


def segment(number, content):
    return bytes([0xFF, number]) + struct.pack(">H", len(content) + 2) + content


def chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


@pytest.mark.parametrize(
    ("values", "dtype", "shown"),
    [
        ([0, 257 * 64, 257 * 128, 65535], np.uint16, [0, 64, 128, 255]),
        ([0, 4096, 8192, 4095], np.uint16, [0, 16, 32, 16]),
        ([0, 257 * 64, 257 * 128, 65535], np.int32, [0, 64, 128, 255]),
        ([0, 64, 128, 255], np.int32, [0, 64, 128, 255]),
        ([0, 1_000_000, 2_000_000, 4_000_000], np.int32, [0, 64, 128, 255]),
        ([0, 0.25, 0.5, 1], np.float32, [0, 64, 128, 255]),
        ([0, 64, 128, 255], np.float32, [0, 64, 128, 255]),
        ([np.nan, 0.25, 0.5, 1], np.float32, [0, 64, 128, 255]),
        ([-1, -0.5, 0, 1], np.float32, [0, 64, 128, 255]),
        ([0, 0, 0, 0], np.float32, [0, 0, 0, 0]),
    ],
)
def test_deep_pictures(values, dtype, shown):
    for kind in ("TIFF", "PNG")[: 1 + (dtype == np.uint16)]:  # PNG has 16 bits at most
        image = decode_picture(saved(Image.fromarray(np.array([values], dtype)), kind))
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [pytest.approx([value] * 3, abs=1) for value in shown]


@pytest.mark.parametrize("profile", [None, b"no profile"])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind, profile):
    data = saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), kind, icc_profile=profile)
    assert decode_picture(data).getpixel((8, 8)) == pytest.approx(RED, abs=3)


def grey_profile():
    """An ICC profile of a printer on grey, Lab (60, 0, 0), that has no ink but black."""
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    grid = bytes([153, 128, 128, 0, 128, 128]) * 2**3  # without black, with it
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    header = struct.pack(">I4sI4s4s4s12s4s", 0, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp")
    header += bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    content = header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    return struct.pack(">I", len(content)) + content[4:]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile(kind):
    data = saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), kind, icc_profile=grey_profile())
    assert decode_picture(data).getpixel((8, 8)) == pytest.approx((145, 145, 145), abs=3)


BROKEN = {
    "EXIF": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xffgarbage"),
    "EXIF header": segment(0xE1, b"Exif\0\0garbage"),
    "ICC": segment(0xE2, b"ICC_PROFILE\0\x01\x01garbage"),
    "ICC header": segment(0xE2, b"ICC_PROFILE\0"),
    "MPO": segment(0xE2, b"MPF\0II*\0\x08\0\0\0garbage"),
    "JFIF": segment(0xE0, b"JFIF\0\x01"),
    "IPTC": segment(0xED, b"Photoshop 3.0\x008BIM\x04"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_of_a_jpeg(name):
    data = red("JPEG")
    image = decode_picture(data[:2] + BROKEN[name] + data[2:])
    assert np.array_equal(image, decode_picture(data))


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"tEXt", b"a\0b", checksum=1),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"x\0\0garbage"),
        chunk(b"eXIf", b"garbage"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"pHYs", b"\1"),
        chunk(b"gAMA", b""),
        chunk(b"acTL", b"\0"),
    ],
    ids=lambda broken: broken[4:8].decode(),
)
def test_broken_metadata_of_a_png(broken):
    data = red("PNG")
    assert decode_picture(data[:33] + broken + data[33:]).getpixel((0, 0)) == RED


def test_broken_metadata_of_a_webp():
    assert decode_picture(red("WEBP", exif=b"Exif\0\0garbage", icc_profile=b"garbage")).size == (16, 16)


def test_good_metadata_is_heeded():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(red("JPEG", (8, 20), exif=exif)).size == (20, 8)


def test_adobes_colours_outlive_broken_metadata():
    plain = saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG")
    data = plain[:2] + BROKEN["ICC header"] + plain[2:]
    assert decode_picture(data).getpixel((8, 8)) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("broken", [b"", BROKEN["ICC header"]])
def test_a_damaged_picture_is_not_mended(broken):
    data = saved(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(UnreadableError, match=r"^(damaged image \([^\n]*truncated|not an image)"):
        decode_picture(data[:2] + broken + data[2 : len(data) // 2])


def test_bombs():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(UnreadableError, match=r"^too many pixels \(Image size \(3600000000 pixels\) exceeds [^\n]*\)$"):
        decode_picture(data)


@pytest.mark.parametrize("data", [b"", b"no picture", b"<html><body></body></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8"])
def test_no_picture(data):
    with pytest.raises(UnreadableError) as caught:
        decode_picture(data)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    data = red("AVIF")
    # A brand that HEIC shares; the list of compatible ones then says which it is.
    for one in (data, data.replace(b"ftypavif", b"ftypmif1")):
        assert decode_picture(one).getpixel((8, 8)) == pytest.approx(RED, abs=8)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 5">%s</svg>'


def test_svg(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UnreadableError, match=r"an SVG picture \(pip install 'modest-align-kernels\[pictures\]'\)"):
        decode_picture(SVG % b"")
    monkeypatch.undo()
    pytest.importorskip("resvg_py")
    image = decode_picture(SVG % b'<rect width="5" height="5" fill="#c81e3c"/>')
    assert image.size == (512, 256)
    assert (image.getpixel((100, 100)), image.getpixel((400, 100))) == (RED, (255, 255, 255))
    with pytest.raises(UnreadableError, match="damaged image"):
        decode_picture((SVG % b"")[:-9])


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ('viewBox="0 0 1 1000000"', (1, 512)),
        ('viewBox="0 0 1000000 1"', (512, 1)),
        ('width="1000000" height="500000"', (512, 256)),
        ('width="100mm" height="50mm"', (512, 256)),
        ('width="2in" height="4in"', (256, 512)),
    ],
)
def test_an_svg_of_any_size_is_drawn_small(size, drawn):
    """Resvg aborts the process where memory does not suffice, and knows no millimetres without dots per inch."""
    pytest.importorskip("resvg_py")
    svg = f'<!--{"x" * 9000}--><svg xmlns="http://www.w3.org/2000/svg" {size}/>'
    assert decode_picture(svg.encode()).size == drawn


XLINK = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink" width="9" height="9">%s</svg>'
IMAGE = '<image href="%s" width="9" height="9"/>'
FILLED = '<rect width="9" height="9" %s/>'
HOSTILE = {
    "href": lambda path: XLINK % IMAGE % path,
    "xlink": lambda path: XLINK % IMAGE.replace("href", "x:href") % path,
    "file URL": lambda path: XLINK % IMAGE % f"file://{path}",
    "character": lambda path: XLINK % IMAGE % f"&#47;{path}",
    "entity": lambda path: f"<!DOCTYPE svg [<!ENTITY e '{IMAGE.replace('f=', '&#102;=') % path}'>]>{XLINK % '&e;'}",
    "pattern": lambda path: XLINK % (
        f'<pattern id="p" width="9" height="9">{IMAGE % path}</pattern>' + FILLED % 'fill="url(#p)"'
    ),
    "filter": lambda path: XLINK % (f'<filter id="f"><feImage href="{path}"/></filter>' + FILLED % 'filter="url(#f)"'),
    "nested": lambda path: XLINK % IMAGE % (
        f"data:image/svg+xml;base64,{base64.b64encode((XLINK % IMAGE % path).encode()).decode()}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_svg_draws_nothing_from_other_files(tmp_path, name):
    pytest.importorskip("resvg_py")
    (tmp_path / "secret.png").write_bytes(red("PNG"))
    picture = decode_picture(HOSTILE[name](tmp_path / "secret.png").encode())
    assert picture.getcolors() == [(512 * 512, (255, 255, 255))]


def test_an_svg_draws_what_it_holds():
    pytest.importorskip("resvg_py")
    uri = f"data:image/png;base64,{base64.b64encode(red('PNG')).decode()}"
    assert decode_picture((XLINK % IMAGE % uri).encode()).getpixel((99, 99)) == RED
    use = '<defs><rect id="r" width="9" height="9" fill="#c81e3c"/></defs><use href="#r"/>'
    assert decode_picture((XLINK % use).encode()).getpixel((99, 99)) == RED


def test_an_svg_that_would_grow():
    pytest.importorskip("resvg_py")
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    with pytest.raises(UnreadableError, match="damaged image"):
        decode_picture(f'<!DOCTYPE svg [<!ENTITY e0 "ha">{entities}]><svg><text>&e9;</text></svg>'.encode())


def test_heic(monkeypatch):
    data = struct.pack(">I", 24) + b"ftypheic" + bytes(12)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableError, match=r"a HEIC picture \(pip install 'modest-align-kernels\[pictures\]'\)"):
        decode_picture(data)
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(Image.new("RGB", (64, 32), RED)).save(buffer, exif=exif.tobytes())
    image = decode_picture(buffer.getvalue())
    assert (image.size, image.getpixel((8, 8))) == ((32, 64), pytest.approx(RED, abs=8))
    with pytest.raises(UnreadableError, match="damaged image"):
        decode_picture(buffer.getvalue()[:-200])
