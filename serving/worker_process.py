"""`python -m serving.worker_process`: one worker of `pawl serve`, started by `serving.supervisor` alone."""

from __future__ import annotations

import socket
import sys

from monitoring import exposition
from pawl.settings import Settings
from serving.child_main import Inheritance, run_child
from serving.gateway import create_app
from serving.server import run_gateway


def serve(settings: Settings, given: Inheritance) -> None:
    """Run a gateway on the parent's sockets."""
    exposition.join(given.place)
    sockets = [socket.socket(fileno=descriptor) for descriptor in given.listeners]
    run_gateway(create_app(settings, drains_here=False), sockets, on_ready=given.on_ready, place=given.place)
    given.place.publish()


if __name__ == "__main__":
    sys.exit(run_child(serve))
