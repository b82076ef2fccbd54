"""Tests of code in two processes: the one that asserts has none of the code, the one that has the code no tests.

    checker                                      code
      assert f([1, 2]) == 3   -- call f ------>   f([1, 2])
              compare here    <----- 3 --------   plain values travel by value, all else stays and has a handle

So code that patches `assert`, walks the stack, ends its process, prints "passed" or returns what equals everything
changes nothing: a handle never equals a plain value, and the verdict carries a number that only the checker was told.
"""

from __future__ import annotations

import json
import os
import socket
from typing import NoReturn

from . import program
from .frames import read_frame
from .proxies import CodeEnded, Peer, names_of, tested

MODULE = "solution"


def serve_code(code: str, to_tests: socket.socket) -> NoReturn:
    """The code's process: run it as a module, say which names it has, answer calls until the checker has gone."""
    peer = Peer(to_tests)
    try:
        namespace = program.execute(code, MODULE)
    except BaseException as error:
        text, _ = program.failed(error)
        peer.send({"failed": f"exited with {error.code}" if isinstance(error, SystemExit) else text})
        os._exit(1)
    peer.send({"names": names_of(namespace, peer)})
    peer.serve()
    os._exit(0)


def run_tests(host_in: int, report: int, to_code: socket.socket) -> NoReturn:
    """The checker's process: read the tests from the host, run them against the code, write the verdict."""
    given = read_frame(host_in)
    os.close(host_in)
    outcome, text = _verdict(given["tests"], Peer(to_code, calls_only=True))
    os.write(report, json.dumps({"verdict": [given["nonce"], outcome, text]}).encode())
    os._exit(0)


def _verdict(tests: str, peer: Peer) -> tuple[str, str]:
    try:
        said = peer.receive()
        if "failed" in said:
            return "error", str(said["failed"])
        namespace = tested(said["names"], peer)
        exec(compile(tests, "<tests>", "exec"), namespace | {"__name__": "tests"})
    except MemoryError as error:
        return "memory", program.describe(error)
    except AssertionError as error:
        return "wrong", program.describe(error)
    except CodeEnded:
        return "error", "the code ended its process before its tests were through"
    except SystemExit as error:
        return "error", f"the tests ended with sys.exit({error.code!r})"
    except BaseException as error:
        return "error", program.describe(error)
    return "ok", ""
