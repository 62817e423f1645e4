"""An engine that draws requests ahead in a thread of its own, as those do that batch them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from pipeline.engines import Reply, Request, echo


class Window:
    """An engine that holds `size` requests, as far as there are any, and answers them one by one."""

    model, revision = "window", "1"

    def __init__(self, size: int, answer: Callable[[Request], Reply] | None = None) -> None:
        """`answer` is echo's by default."""
        self.size, self.most = size, 0  # requests held at once, so far
        self.seen: list[Request] = []
        self._echo = echo.open(echo.Config())
        self._answer = answer

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        drawn: deque[Request | None] = deque()
        changed = threading.Condition()

        def draw() -> None:
            for request in requests:
                with changed:
                    changed.wait_for(lambda: len(drawn) < self.size)
                    drawn.append(request)
                    self.seen.append(request)
                    self.most = max(self.most, len(drawn))
                    changed.notify_all()
            with changed:
                drawn.append(None)
                changed.notify_all()

        threading.Thread(target=draw, daemon=True).start()
        while True:
            with changed:
                changed.wait_for(lambda: bool(drawn))
                request = drawn.popleft()
                changed.notify_all()
            if request is None:
                return
            yield self._answer(request) if self._answer else next(self._echo.generate([request]))

    def waiting(self) -> float | None:
        return None

    def close(self) -> None:
        pass
