"""Runs as a child process of the supervisor, and starts a grandchild that keeps standard output open.

The command is `python -m tests.support.stubborn`. The line on standard input is a path. The process id of the grandchild is
written to that file.
"""

import os
import subprocess
import sys
from pathlib import Path

from engine import lifeline

if __name__ == "__main__":
    path = Path(os.fsdecode(lifeline.read_start()))
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    path.write_text(str(grandchild.pid))
    lifeline.tell(lifeline.READY)
    grandchild.wait()
