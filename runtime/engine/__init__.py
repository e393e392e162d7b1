"""The scheduler: which tokens run in the next step, where their KV lives, and how each request ends.

Pure: events in (`Engine` methods), plans and outputs out. Knows nothing of tensors, sockets, clocks or
randomness; the caller says what time it is. `engine.py` is the way in.
"""

from runtime.engine.check import IntegrityError
from runtime.engine.engine import Engine

__all__ = ["Engine", "IntegrityError"]
