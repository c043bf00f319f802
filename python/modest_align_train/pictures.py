"""Pictures as one sees them: whatever the format, the depth, the colours and the state of the metadata."""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import suppress
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# What may be a picture by its name; what it is in truth its content says.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".heic", ".heif", ".svg"),
)
MAX_PIXELS = 178_956_970  # as Pillow has it: half a GiB in RGB
_SVG_SIDE = 512
_EXTRA = "pip install 'modest-align-kernels[pictures]'"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# On metadata that is broken, and from half of the limit on: neither is the user's concern.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableError(OSError):
    """A picture that cannot be read.

    Attributes:
        reason: Why, in a few words that are the same for all of a kind.
        detail: What is special about this one, or "".
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        self.reason, self.detail = reason, " ".join(str(detail).split())
        super().__init__(f"{reason} ({self.detail})" if self.detail else reason)


def decode_picture(data: bytes) -> Image.Image:
    """Decode a file of a picture, of which its content says the format.

    Args:
        data: JPEG, PNG, WebP, AVIF, TIFF and what else Pillow knows; SVG and HEIC with the extra ``pictures``.

    Returns:
        The whole picture in mode RGB, upright (EXIF orientation applied), transparent pixels on white, 16-bit and
        floating-point values scaled to 8 bits. Metadata that is broken is ignored.

    Raises:
        UnreadableError: It is none, a damaged one, or one of more than `MAX_PIXELS`.
    """
    try:
        return _decode(data)
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        try:
            return _decode(_without_metadata(data))
        except Exception:
            if isinstance(error, UnidentifiedImageError):
                raise UnreadableError("not an image") from None
            raise UnreadableError("damaged image", error or type(error).__name__) from None


def _decode(data: bytes) -> Image.Image:
    brands = data[8 : int.from_bytes(data[:4], "big")] if data[4:8] == b"ftyp" else b""
    if brands[:4] in _HEIC_BRANDS and b"avif" not in brands:
        image = _open_heic(data)
    else:
        if b"<svg" in data[:65536] and data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
            data = _draw_svg(data)
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise UnreadableError("too many pixels", str(error).partition(",")[0]) from None
        image.load()
    with suppress(Exception):  # broken EXIF is no reason to lose a picture that is whole
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Bring integers of 16 or 32 bits, or floating-point values, to 8 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    # The type says where white is in 16 bits only; elsewhere the smallest usual scale that holds all values.
    scales = (65535.0,) if image.mode.startswith("I;16") else (1.0,) * (image.mode == "F") + (255.0, 65535.0)
    white = next((scale for scale in scales if low >= 0 and high <= scale), None)
    if white is None:
        values, white = values - low, high - low
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Convert CMYK by its own colour profile, if it has a good one."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        converted = None
    return converted or image.convert("RGB")


def _without_metadata(data: bytes) -> bytes:
    """Leave out of a PNG or JPEG what is not needed to decode its pixels."""
    kept, start = [], 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, start = [data[:8]], 8
        while start + 12 <= len(data):
            end = start + 12 + struct.unpack_from(">I", data, start)[0]
            if data[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(data[start:end])
            start = end
    elif data.startswith(b"\xff\xd8"):
        kept, start = [data[:2]], 2
        while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda" and start + 4 <= len(data):
            end = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
            marker = data[start + 1]
            # Application segments, but for Adobe's, which names the colours, and comments.
            if not (0xE0 <= marker <= 0xEF and marker != 0xEE) and marker != 0xFE:
                kept.append(data[start:end])
            start = end
    return b"".join([*kept, data[start:]])


def _draw_svg(data: bytes) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise UnreadableError("an SVG picture", _EXTRA) from None
    try:
        # Both sides bound the picture, whose proportions stay; sizes in millimetres or inches need dots per inch.
        text = _without_files(data)
        return bytes(resvg_py.svg_to_bytes(svg_string=text, width=_SVG_SIDE, height=_SVG_SIDE, dpi=96))
    except Exception as error:
        raise UnreadableError("damaged image", error) from None


def _without_files(svg: bytes) -> str:
    """Leave out what an SVG would draw from other files: they may be anywhere on the disk."""
    root = ElementTree.fromstring(svg)  # expands entities, which may hold markup
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name.rpartition("}")[2] == "href" and not value.strip().startswith(("#", "data:")):
                del element.attrib[name]
    return ElementTree.tostring(root, encoding="unicode")


def _open_heic(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise UnreadableError("a HEIC picture", _EXTRA) from None
    picture = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UnreadableError("too many pixels", f"{width} x {height}")
    return picture.to_pillow()
