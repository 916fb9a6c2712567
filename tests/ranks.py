"""Two processes of one distributed run."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: str) -> None:
    """Run ``tests/SCRIPT RANK PORT`` for both ranks; both have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(__file__).with_name(script)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
