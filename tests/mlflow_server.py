"""The little of MLflow's REST server that a run talks to, as a process of its own that can die or stop answering.

python -m tests.mlflow_server PORT FILE     appends to FILE a line for every metric it was given
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EXPERIMENT = {"experiment_id": "1", "name": "rlhf-dist", "lifecycle_stage": "active"}


class Handler(BaseHTTPRequestHandler):
    folder: Path
    file: Path

    def do_GET(self) -> None:
        if "get-by-name" in self.path:
            self._answer({"experiment": {**EXPERIMENT, "artifact_location": str(self.folder)}})
        else:
            self._answer({"run": self._run()})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"run": self._run(), "run_info": self._run()["info"]})
        with self.file.open("a") as file:
            for metric in asked.get("metrics", ()):
                file.write(f"{metric['step']} {metric['key']} {metric['value']}\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _run(self) -> dict[str, Any]:
        info = {"run_id": "a" * 32, "run_uuid": "a" * 32, "experiment_id": "1", "status": "RUNNING", "start_time": 1}
        info |= {"artifact_uri": str(self.folder), "lifecycle_stage": "active"}
        return {"info": info, "data": {}}

    def _answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    Handler.file = Path(sys.argv[2])
    Handler.folder = Handler.file.parent
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print("up", flush=True)
    server.serve_forever()
