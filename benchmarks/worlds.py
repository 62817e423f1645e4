"""Seeds of the worlds that no training uses: three are opened only to report, one serves tuning and choice."""

from __future__ import annotations

TEST = (91_001, 91_002, 91_003)
CHOICE = 90_001  # earlier figures were measured here too, so it has been both test and tuning set
HELD_OUT = frozenset({*TEST, CHOICE})
