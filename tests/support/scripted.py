"""A child of the supervisor that runs Python code: `python -m tests.support.scripted`.

The line on standard input is the code, with semicolons between statements. The code can use `lifeline`, `os`, `sys`, `time`,
and `wait()`, which never returns.
"""

import os
import sys
import threading
import time

from engine import lifeline

if __name__ == "__main__":
    names = {"lifeline": lifeline, "os": os, "sys": sys, "time": time, "wait": threading.Event().wait}
    exec(lifeline.read_start().decode(), names)
