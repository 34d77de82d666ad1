"""A page that runs exported models: a folder for any static server, and a server of our own.

    index.html, assets/   the page, built by npm from the sources in export/runtimes/web
    fp32/, int4/, …       exported models
    models.json           which of them WebGPU runs, and which WebAssembly

Built pages are kept in a cache, one for every state of their sources. npm takes the exact versions
of the lock file and runs no package's own scripts.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rwkv_core._files import atomic_folder, cache_folder
from rwkv_core.errors import ExportError

__all__ = ["MODELS", "WHOLE", "assign", "page", "serve", "server", "site"]

logger = logging.getLogger(__name__)

MODELS = "models.json"
WHOLE = "fp32"
# MatMulNBits runs at a twentieth of fp32 on WebAssembly, MatMulInteger not at all on WebGPU
PLACES = {"fp16": ("webgpu", "wasm"), "int8-dynamic": ("wasm",)}
HERE = Path(__file__).parent
SOURCES = ("common", "web")


def page() -> Path:
    """Return the folder of the built page, after building it if the cache has none.

    Raises:
        ExportError: Node.js or npm is missing or too old, or the build failed; says what to do.
    """
    sources = _sources()
    built = cache_folder("web") / _digest(sources)
    if built.exists():
        return built
    _check_node()
    logger.info("building the page with npm; once, it takes about half a minute")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for file in _files(sources):
            target = work / file.relative_to(sources)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        for command in (["npm", "ci"], ["npm", "run", "build"]):
            _npm(command, work / "web")
        with atomic_folder(built) as temporary:
            shutil.copytree(work / "web" / "dist", temporary, dirs_exist_ok=True)
    return built


@contextmanager
def site(out: Path) -> Iterator[Path]:
    """Give a temporary folder that holds the page, to be filled with models, then rename it.

    Raises:
        ExportError: ``out`` exists, or there is no page: see :func:`page`.
    """
    if out.exists():
        raise ExportError(f"{out} exists already; remove it or choose another folder")
    built = page()
    with atomic_folder(out) as folder:
        shutil.copytree(built, folder, dirs_exist_ok=True)
        yield folder


def assign(folder: Path, scheme: str | None = None) -> None:
    """Write ``models.json``: the model of a scheme of quantisation goes where it runs well.

    The one in ``fp32`` goes to the rest; if none is left, it is removed.

    Raises:
        ExportError: WebGPU would get a table whose rows are of 8 bits, which it does not read.
    """
    models = dict.fromkeys(("webgpu", "wasm"), WHOLE)
    if scheme:
        models |= dict.fromkeys(PLACES.get(scheme, ("webgpu",)), scheme)
        if models["webgpu"] == scheme and (tables := tables_in_8_bits(folder / scheme)):
            raise ExportError(
                f"{scheme} stores {', '.join(tables)} in 8 bits, whose rows WebGPU does not read; "
                "add --keep embed, or take int8-dynamic, which is for WebAssembly"
            )
    if WHOLE not in models.values():
        shutil.rmtree(folder / WHOLE)
    (folder / MODELS).write_text(json.dumps(models, indent=2) + "\n")


def tables_in_8_bits(folder: Path) -> list[str]:
    """Return the tables of bytes that the graphs of a folder look rows up in."""
    import onnx

    found = set()
    for path in folder.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        dtypes = {t.name: t.data_type for t in graph.initializer}
        names = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        bytewise = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        found |= {name for name in names if dtypes.get(name) in bytewise}
    return sorted(found)


def server(folder: Path, port: int = 8000) -> ThreadingHTTPServer:
    """Return a server of a folder for this machine alone, which tells browsers to allow threads.

    Args:
        folder: what to serve; must hold ``index.html``.
        port: 0 takes any that is free.

    Raises:
        ExportError: no page in the folder, or the port is taken.
    """
    if not (folder / "index.html").is_file():
        raise ExportError(f"{folder} holds no page; write one with: rwkv export MODEL FOLDER --web")
    try:
        return _Server(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise ExportError(
            f"port {port} cannot be used: {error.strerror}; name another one with --port"
        ) from error


def serve(folder: Path, port: int = 8000, pages: tuple[str, ...] = ("",)) -> None:
    """Serve a folder until Ctrl-C; print the address of each of its ``pages``."""
    with server(folder, port) as running:
        for query in pages:
            print(f"http://127.0.0.1:{running.server_address[1]}/{query}", flush=True)
        print("Ctrl-C stops", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about visitors who leave before all is sent."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        # a browser gives threads to a page that keeps to itself
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


_Handler.extensions_map = {
    **SimpleHTTPRequestHandler.extensions_map,
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}


def _sources() -> Path:
    """Return where the page's sources are: in an installed package, or beside it in a checkout."""
    for folder in (HERE / "runtimes", HERE.parent / "runtimes"):
        if (folder / "web" / "package-lock.json").is_file():
            return folder
    raise ExportError(f"the sources of the page are not beside {HERE}; install rwkv-toolkit again")


def _files(sources: Path) -> list[Path]:
    made = {"node_modules", "dist"}
    files = (f for name in SOURCES for f in (sources / name).rglob("*") if f.is_file())
    return sorted(f for f in files if not made & {*f.relative_to(sources).parts})


def _digest(sources: Path) -> str:
    key = hashlib.sha256()
    for file in _files(sources):
        key.update(str(file.relative_to(sources)).encode() + b"\0" + file.read_bytes() + b"\0")
    return key.hexdigest()[:20]


def _check_node() -> None:
    for program in ("node", "npm"):
        if not shutil.which(program):
            raise ExportError(
                f"the page is built with Node.js ≥ 20.19 and its npm, but there is no {program} on "
                "the PATH; install them (nodejs.org, or your system's packages nodejs and npm), or "
                "export without --web"
            )
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout
    try:
        version = tuple(int(part) for part in said.strip().lstrip("v").split(".")[:2])
    except ValueError:
        version = (0, 0)
    if version < (20, 19):
        raise ExportError(
            f"the page is built with Node.js ≥ 20.19, but node --version says {said.strip()!r}; "
            "install a newer one, or export without --web"
        )


def _npm(command: list[str], folder: Path) -> None:
    result = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        said = "\n".join(result.stdout.strip().splitlines()[-12:])
        raise ExportError(
            f"{' '.join(command)} failed, and without it there is no page; it needs npm's registry "
            f"or a full npm cache. It said:\n{said}"
        )
