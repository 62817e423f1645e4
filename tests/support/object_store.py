"""A real S3 server on 127.0.0.1, in this process, with an empty bucket."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import Request, urlopen

BUCKET = "corpus"
SECRET = "sesame-open-0123456789"


@contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
    """Starts the server; yields the environment that its clients need, which this process has meanwhile."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    # Servers of one process share their objects.
    reset = Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    urlopen(reset).close()
    with patch.dict(os.environ, environment):
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        try:
            yield environment
        finally:
            server.stop()


def put_folder(folder: Path, name: str) -> str:
    """Copies a local folder into the bucket; returns its URL."""
    filesystem = connect()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            filesystem.pipe_file(f"{BUCKET}/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{BUCKET}/{name}"


def connect() -> Any:
    import fsspec

    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    return filesystem
