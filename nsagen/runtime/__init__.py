"""The running side: which kernel serves a call, on which device, and what happens on a miss.

Importing it needs neither torch nor triton, so that generated tables load fast.
"""

from nsagen.runtime.dispatcher import Dispatcher
from nsagen.runtime.package import load
from nsagen.runtime.table import Bucket, Table

__all__ = ["Bucket", "Dispatcher", "Table", "load"]
