"""Image formats: the readers of those that are supported, and detection by a file's first bytes, never by its name.

It opens no files and knows nothing of pixels.
"""

from __future__ import annotations

import io
import re
import warnings
from codecs import getincrementaldecoder
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile


@cache
def import_readers() -> dict[str, Callable[[io.BytesIO], ImageFile]]:
    """Imports the readers of the supported formats. None of them starts a program or opens another file."""
    from PIL.AvifImagePlugin import AvifImageFile
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.IcoImagePlugin import IcoImageFile
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
    from PIL.JpegImagePlugin import JpegImageFile  # also for MPO: a camera's JPEG with previews behind it
    from PIL.PngImagePlugin import PngImageFile
    from PIL.PpmImagePlugin import PpmImageFile
    from PIL.QoiImagePlugin import QoiImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    # An odd file is reported in its row, not on standard error.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    return {
        "JPEG": JpegImageFile,
        "PNG": PngImageFile,
        "WEBP": WebPImageFile,
        "GIF": GifImageFile,
        "AVIF": AvifImageFile,
        "TIFF": TiffImageFile,
        "BMP": BmpImageFile,
        "ICO": IcoImageFile,
        "JPEG2000": Jpeg2KImageFile,
        "PPM": PpmImageFile,
        "QOI": QoiImageFile,
    }


def _compile_patterns(**patterns: bytes) -> dict[str, re.Pattern[bytes]]:
    return {name: re.compile(pattern, re.DOTALL) for name, pattern in patterns.items()}


_MAGIC = _compile_patterns(
    JPEG=rb"\xff\xd8\xff",
    PNG=rb"\x89PNG\r\n\x1a\n",
    WEBP=rb"RIFF.{4}WEBP",
    GIF=rb"GIF8[79]a",
    AVIF=rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4}){0,9}avi[fs])",
    TIFF=rb"II[*+]\0|MM\0[*+]",
    BMP=rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",  # two letters alone would match many texts
    ICO=rb"\0\0\x01\0[\x01-\xff]",
    JPEG2000=rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    PPM=rb"P[1-6]\s+(#[^\n]*\n\s*)*[0-9]",
    QOI=rb"qoif",
)
_FOREIGN = {
    name.replace("_", " "): pattern
    for name, pattern in _compile_patterns(
        SVG=rb"(?i)(\xef\xbb\xbf)?\s*(<(\?xml|!--|!doctype svg)[^\0]{0,4000}?)?<svg",
        HTML=rb"(?i)(\xef\xbb\xbf)?\s*(<!--[^\0]{0,4000}?-->\s*)?<(!doctype html|html|head|body|script|title|meta)",
        XML=rb"(\xef\xbb\xbf)?\s*<\?xml",
        JSON=rb"\s*(\{\s*\"|\[\s*[\[{\"])",
        HEIC=rb".{4}ftyp(hei[cxmsf]|hev[cmsx]|mif1|msf1)",
        a_video=rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI |\0\0\x01[\xb3\xba]|FLV\x01",
        JPEG_XL=rb"\xff\x0a|\0\0\0\x0cJXL ",
        PDF=rb"\s*%PDF-",
        PostScript=rb"%!PS|\xc5\xd0\xd3\xc6",
        Photoshop=rb"8BPS",
        a_Windows_metafile=rb"\xd7\xcd\xc6\x9a|\x01\0\t\0|\x01\0\0\0.{36} EMF",
        a_ZIP_archive=rb"PK\x03\x04|PK\x05\x06",
        gzip=rb"\x1f\x8b",
        a_DDS_texture=rb"DDS ",
        a_sound=rb"ID3|OggS|fLaC|RIFF.{4}WAVE",
    ).items()
}


def detect_format(data: bytes) -> str | None:
    """Returns the format of `data`, as named by `import_readers`; None if it is not a supported one."""
    return next((name for name, magic in _MAGIC.items() if magic.match(data)), None)


def describe_foreign(data: bytes) -> str | None:
    """Describes data of a known but unsupported kind, such as "HTML"; None if the kind is unknown."""
    name = next((name for name, magic in _FOREIGN.items() if magic.match(data)), None)
    return name or ("text" if _is_text(data[:1024]) else None)


def _is_text(head: bytes) -> bool:
    if len(head) < 4 or re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", head):
        return False
    try:
        getincrementaldecoder("utf-8")().decode(head)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return False
    return True
