"""Bounded bodies of HTTP responses, plain and compressed.

The client decompresses them itself, so that a small compressed body cannot become a large one in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterable

from pipeline.errors import BodyError

ENCODINGS = "gzip, deflate"  # that `read_body` understands
GZIP_MAGIC = b"\x1f\x8b"
MAX_BYTES = 8 * 2**20  # of any body, before and after decompression
LEAST_BYTES = 2**19  # that a body may always have: of 128 answers at once, 64 MiB
TOKEN_BYTES, CHOICE_BYTES = 64, 192  # of a token written as JSON escapes; of one in a list of likely tokens


def bound_bytes(max_tokens: int, top_tokens: int) -> int:
    """The most bytes that an answer of so many tokens needs, with so many likely tokens for each."""
    needed = max_tokens * (TOKEN_BYTES + (CHOICE_BYTES * (1 + top_tokens) if top_tokens else 0))
    return min(MAX_BYTES, LEAST_BYTES + needed)


async def read_body(chunks: AsyncIterable[bytes], *, encoding: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a whole body.

    Args:
        chunks: the bytes as they were sent.
        encoding: the value of Content-Encoding.
        max_bytes: of the body, before and after decompression.

    Raises:
        BodyError: it is larger, its encoding is not one of ENCODINGS, or it does not decompress.
    """
    decoder = _Decoder(encoding.strip().lower())
    body, num_read = bytearray(), 0
    async for chunk in chunks:
        num_read += len(chunk)
        body += decoder.decode(chunk, max_bytes + 1 - len(body))
        if max(len(body), num_read) > max_bytes:
            raise BodyError(f"sent more than {max_bytes / 2**20:g} MiB")
    return bytes(body)


class _Decoder:
    """Undoes one content encoding."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise BodyError("sent a body in an encoding that was not asked for")
        self._is_plain = encoding in ("", "identity")
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the header of gzip or zlib
        self._is_first = True

    def decode(self, chunk: bytes, max_length: int) -> bytes:
        """At most `max_length` bytes, which is at least 1."""
        if self._is_plain:
            return chunk[:max_length]
        try:
            try:
                data = self._zlib.decompress(chunk, max_length)
            except zlib.error:
                if not self._is_first:
                    raise
                self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)  # some servers send deflate without a header
                return self._zlib.decompress(chunk, max_length)
            while len(data) < max_length and (rest := self._zlib.unused_data).startswith(GZIP_MAGIC):
                self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip members may follow one another
                data += self._zlib.decompress(rest, max_length - len(data))
            return data
        except zlib.error as error:
            raise BodyError("sent a body that does not decompress") from error
        finally:
            self._is_first = False
