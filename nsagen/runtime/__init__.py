"""The run-time side: which kernel serves a call, on which device, and what a miss does.

Importing it needs neither torch nor triton, so generated tables load fast.
"""

from nsagen.core.bucket import Bucket, Table
from nsagen.core.releases import Releases
from nsagen.core.workload import Workload
from nsagen.runtime.dispatcher import Dispatcher
from nsagen.runtime.package import load

__all__ = ["Bucket", "Dispatcher", "Releases", "Table", "Workload", "load"]
