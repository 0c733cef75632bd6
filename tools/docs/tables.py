"""Tables of the guides that are made from code and from committed figures, so that they are true after the next run."""

from collections.abc import Callable

TABLES: dict[str, Callable[[], str]] = {}
