"""The page on which people label captions: one static HTML file that needs no server and sends nothing.

Labellers see the picture and its caption, sentence by sentence, and neither scores nor verdicts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib import resources
from itertools import groupby
from pathlib import Path

from pipeline.decoding import images
from pipeline.errors import UndecodableError
from pipeline.execution.passes import Shard
from pipeline.records import Image
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.plan import Plan
from pipeline.storage.sentences import split_sentences
from stages.audit.drawing import DrawnCaption

PICTURE = images.PixelRule(max_pixels=512 * 512, min_pixels=1, factor=1)
FILE = "audit.html"


def write_page(run: Run, captions: Sequence[DrawnCaption]) -> Path:
    """Writes `<run>/audit.html` with these captions in their order; the pictures are embedded, reduced."""
    pictures = dict(_read_pictures(run, {caption.key for caption in captions}))
    items = [
        {
            "key": caption.key,
            "caption": caption.caption,
            "candidate": caption.candidate,
            "text": caption.text,
            "sentences": split_sentences(caption.text),
            "picture": pictures.get(caption.key),
        }
        for caption in captions
    ]
    path = run.folder / FILE
    with tables.open_atomic(path) as file:
        file.write(render_page(run.folder.resolve().name, items).encode("utf-8", "replace"))
    return path


def render_page(title: str, items: Sequence[Mapping[str, object]]) -> str:
    """The page; data of the run is in it as JSON, which the page's own script shows as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("stages.audit"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = (resources.files("stages.audit") / "templates" / "audit.js").read_text(encoding="utf-8")
    drawn = json.dumps([[item[name] for name in ("key", "caption", "candidate", "text")] for item in items])
    digest = hashlib.sha256(f"{title}{drawn}".encode("utf-8", "replace")).hexdigest()  # for the marks of this draw
    data = json.dumps({"id": digest, "run": title, "items": items}).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    hash_source = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Both are safe within their elements: the data has no "<", and the script is ours.
    return environment.get_template("audit.html.j2").render(
        title=title, data=Markup(data), script=Markup(script), script_hash=hash_source, num_items=len(items)
    )


def _read_pictures(run: Run, keys: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Key -> data URL of a reduced JPEG; None where the picture cannot be shown. Read shard by shard, in file order."""
    for number, group in groupby(sorted(keys), lambda key: int(key[:6])):
        wanted, plan = set(group), Plan.load(run.folder / "plan.parquet", str(number))[0]
        with closing(Shard(run=run, number=number, pieces=plan.pieces(number))) as shard:
            for image in shard.read_table("image", Image):
                if image.key in wanted:
                    yield image.key, _encode_picture(shard, image)


def _encode_picture(shard: Shard, image: Image) -> str | None:
    try:
        picture = images.decode_pixels(shard.read_image(image), PICTURE)
    except (UndecodableError, OSError):
        return None
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, comment=b"")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
