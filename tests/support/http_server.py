"""Runs an ASGI application behind `server.http.guard`, in a real uvicorn that runs in a thread and listens on a free port."""

from __future__ import annotations

import contextlib
import socket
import threading

import uvicorn

from server.http.guard import guarded


@contextlib.contextmanager
def serving(app, limits, count=lambda status: None):
    """Serve `app` behind the guard with `limits`, and yield the port. The guard calls `count` with the status of each refusal."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=guarded(limits, count), ws="none", lifespan="off", access_log=False, log_level="critical", loop="uvloop"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()
