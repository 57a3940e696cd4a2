"""Runs Python code as a child process of the supervisor: `python -m tests.support.scripted`.

The process reads the code from one line of standard input, with semicolons between statements. The code can use `lifeline`, `os`,
`sys`, `time`, and `wait()`, which never returns.
"""

import os
import sys
import threading
import time

from engine import lifeline

if __name__ == "__main__":
    names = {"lifeline": lifeline, "os": os, "sys": sys, "time": time, "wait": threading.Event().wait}
    exec(lifeline.read_start().decode(), names)
