"""Threads may import different parts of nsagen at once."""

from __future__ import annotations

import subprocess
import sys

THREADS = """
import sys, threading, time
sys.setswitchinterval(1e-5)
import nsagen
package, *statements = sys.argv[1:]
failures, looking = [], threading.Event()
class Slow:  # while one thread looks for the package, the others start on its modules
    def find_spec(self, name, path, target=None):
        if name == package:
            looking.set()
            time.sleep(0.5)
sys.meta_path.insert(0, Slow())
def run(statement):
    try:
        exec(statement)
    except nsagen.InvalidInputError:
        pass
    except BaseException as error:
        failures.append(f"{statement}: {error!r}")
threads = [threading.Thread(target=run, args=(statements[i % len(statements)],)) for i in range(8)]
for thread in threads:
    thread.start()
    looking.wait()
for thread in threads:
    thread.join()
sys.exit("; ".join(failures) or 0)
"""


def test_threads_that_load_a_package_and_import_the_runtime_do_not_deadlock() -> None:
    arguments = ["nsagen.runtime", "import nsagen.runtime", "nsagen.load('nothing')"]
    command = [sys.executable, "-c", THREADS, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
