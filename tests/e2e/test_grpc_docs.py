"""Runs the Python example of docs/grpc.md with the commands of that page, against a server with the real service."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.support.local_engine import LocalEngine
from tests.support.rpc import serving
from tests.support.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/grpc.md").read_text()


@pytest.fixture
def client(tmp_path):
    """Run the commands of docs/grpc.md that generate client code. Return a path beside it for the page's example client."""
    (commands,) = re.findall(r"```sh\n(mkdir.*?)```", PAGE, re.DOTALL)
    folder = tmp_path / "client"
    commands = commands.replace("/tmp/tidegate-client", str(folder)).replace(".venv/bin/python", sys.executable)
    subprocess.run(["sh", "-ec", commands], cwd=ROOT, check=True)
    return folder / "client.py"


async def test_the_python_example_runs(client, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    text = Tokenizer.from_folder(write_tiny_checkpoint(tmp_path / "cache"))
    async with LocalEngine() as engine:
        service = GenerateService(engine, text, Settings(), Metrics("tiny", lambda: engine.health))
        async with serving(service) as rpc:
            for prompt, said in (("The tide comes in", "tokens in"), ("", "INVALID_ARGUMENT prompt")):
                script = code.replace("localhost:9000", f"127.0.0.1:{rpc.server.port}").replace("The tide comes in", prompt)
                assert prompt in script
                client.write_text(script)
                child = await asyncio.create_subprocess_exec(
                    sys.executable, client, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
                )
                out, err = await asyncio.wait_for(child.communicate(), 30)
                assert child.returncode == 0, err.decode()
                assert said in out.decode()
