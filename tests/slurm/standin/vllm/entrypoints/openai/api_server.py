"""Stands in for vLLM's server where vLLM is not installed: the same flags, and the echo engine's answers."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

from tests.support.faults import Faulty

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--no-such-model", action="store_true")
    flags, _ = parser.parse_known_args()
    if flags.no_such_model:
        sys.exit("there is no such model")
    time.sleep(5)  # as a model is loaded
    server = Faulty(port=flags.port)
    server.model = flags.served_model_name
    server.key = os.environ["VLLM_API_KEY"]
    with server:
        threading.Event().wait()
