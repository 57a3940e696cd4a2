"""A child of the supervisor's whose own child keeps its standard output: `python -m tests.support.stubborn`. The line on standard
input is a path, to which the grandchild's process id is written."""

import os
import subprocess
import sys
from pathlib import Path

from engine import lifeline

if __name__ == "__main__":
    path = Path(os.fsdecode(lifeline.read_start().strip()))
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    path.write_text(str(grandchild.pid))
    lifeline.tell(lifeline.READY)
    grandchild.wait()
