"""``edgellm serve``: starts, says where, stops on Ctrl-C; plain words on what is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from edgellm.cli import main

CALL = "import sys; from edgellm.cli import main; sys.exit(main(sys.argv[1:]))"


def test_an_open_address_without_a_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="the server needs its extra: pip install edgellm[server]")
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "--api-key" in capsys.readouterr().err


def test_a_taken_port_is_said_with_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="the server needs its extra: pip install edgellm[server]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port}" in said and f"--port {port + 1}" in said


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "msgspec"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; {CALL}"
    run = subprocess.run(
        [sys.executable, "-c", code, "serve", "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and "pip install 'edgellm[server]'" in run.stderr


def test_help_and_the_library_import_nothing_of_the_server() -> None:
    heavy = "{'starlette', 'uvicorn', 'msgspec', 'numba'} & {name.partition('.')[0] for name in sys.modules}"
    code = f"import sys, edgellm; from edgellm.cli import main; main(['serve', '--help']); sys.exit(str({heavy} or ''))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Serve models over HTTP" in run.stdout and not run.stderr.strip()


def test_a_wrong_duration_and_an_alias_of_nothing_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--keep-alive", "soon"]) == 2
    assert "5m" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_it_says_where_it_is_and_stops_on_ctrl_c(smollm2_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server needs its extra: pip install edgellm[server]")
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {CALL}"]
    options = ["serve", str(smollm2_path), "--port", "0", "-c", "512", "--alias", "small"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        url = line.split(" at ")[1].split("/v1")[0]
        with urllib.request.urlopen(f"{url}/v1/models/small", timeout=60) as reply:
            assert json.load(reply)["meta"]["n_ctx"] == 512
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
    finally:
        server.kill()
