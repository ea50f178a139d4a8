"""Build the CNI binary: `python -m cni.freeze OUTPUT`.

A node may have no Python, so the interpreter is linked into the executable, statically, with the plugin's
compiled modules inside:

    cni/*.py --compile, marshal--> modules.h --+
    cni/launcher.c ----------------------------+--gcc -static--> OUTPUT
    libpython3.X.a (libpython3.X-dev) ---------+

The result needs no file but itself and the agent's socket. The same sources, compiler and interpreter give
the same bytes; a build is kept under their digest and copied when it is asked for again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
MODULES: Mapping[str, Path | None] = {
    "__future__": None,
    "dataclasses": HERE / "frozen_dataclasses.py",
    "json": HERE / "frozen_json.py",
    "cni": HERE / "__init__.py",
    "cni.wire": HERE / "wire.py",
    "cni.spec": HERE / "spec.py",
    "__main__": HERE / "__main__.py",
    "encodings": None,
}
"""What is frozen, by the name it is imported as; up to `__main__` in the order of import.

`__future__` and `encodings` only have to be there: the one for `from __future__ import annotations`, the
other for the interpreter when a decoding fails (UTF-8 itself is built in).
"""
COMPILE = """
import marshal, sys
for argument in sys.argv[1:]:
    name, _, path = argument.partition("=")
    source = open(path, encoding="utf-8").read() if path else "annotations = None"
    # as -OO: no docstrings, no assertions; a file name that does not tell where it was built
    code = compile(source, f"<frozen {name}>", "exec", dont_inherit=True, optimize=2)
    print(name, marshal.dumps(code).hex())
"""
PACKAGES = ("cni",)
LIBRARIES = ("-lm",)
ARCHIVES = {"libc.a": "libc6-dev", "libm.a": "libc6-dev"}
"""What is linked besides the interpreter, and the packages it is in."""
FLAGS = (
    "-O2",
    "-s",
    "-static",
    "-no-pie",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--gc-sections",
    "-Wl,--build-id=none",
)
"""No position independence: nothing to relocate at start."""


class FreezeError(Exception):
    """The binary cannot be built here; the message says what to install."""


def main() -> int:
    """Build or copy the binary to the path on the command line."""
    parser = argparse.ArgumentParser(prog="python -m cni.freeze", description="Build the CNI binary.")
    parser.add_argument("output", type=Path, help="where to put the executable")
    parser.add_argument(
        "--cache", type=Path, default=_default_cache(), help="keep builds here (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        freeze(arguments.output, arguments.cache)
    except FreezeError as error:
        sys.stderr.write(f"cni.freeze: {error}\n")
        return 1
    return 0


def freeze(output: Path, cache: Path) -> None:
    """Put the executable at `output`, replacing it atomically. Raises FreezeError."""
    _replace(output, kept(cache).read_bytes())


def kept(cache: Path) -> Path:
    """Return the executable in the cache, built when it is not there yet. Raises FreezeError."""
    include, library = _interpreter()
    compiler = _compiler()
    header = modules_header()
    built = cache / f"podwall-cni-{_digest(header, compiler, library)}"
    if not built.exists():
        _build(built, header, compiler, include, library)
    return built


def modules_header() -> str:
    """Return modules.h: every module compiled and marshalled, as the C arrays that the launcher expects."""
    arrays, entries = [], []
    for name, data in _marshalled().items():
        symbol = f"m_{name.replace('.', '_')}"
        arrays.append(f"static const unsigned char {symbol}[] = {{{','.join(map(str, data))}}};")
        entries.append(f'    {{"{name}", {symbol}, {len(data)}, {int(name in PACKAGES)}}},')
    names = list(MODULES)
    order = ", ".join(f'"{name}"' for name in names[: names.index("__main__") + 1])
    return "\n".join(
        [
            *arrays,
            "static const struct _frozen modules[] = {",
            *entries,
            "    {0},",
            "};",
            f"static const char *const order[] = {{{order}, 0}};",
            "",
        ]
    )


def _marshalled() -> Mapping[str, bytes]:
    """Return every module compiled, by a fresh interpreter: marshal shows what else refers to a string."""
    arguments = [f"{name}={path or ''}" for name, path in MODULES.items()]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", COMPILE, *arguments], capture_output=True, check=True
    )
    lines = (line.split() for line in done.stdout.decode().splitlines())
    return {name: bytes.fromhex(data) for name, data in lines}


def _interpreter() -> tuple[Path, Path]:
    """Return the directory of Python.h and the static library. Raises FreezeError."""
    version = sysconfig.get_python_version()
    include = Path(sysconfig.get_path("include"))
    library = Path(sysconfig.get_config_var("LIBPL") or "/") / f"libpython{version}.a"
    for path in (include / "Python.h", library):
        if not path.is_file():
            raise FreezeError(f"{path} is missing: install the package libpython{version}-dev")
    return include, library


def _compiler() -> str:
    compiler = shutil.which("gcc")
    if compiler is None:
        raise FreezeError("gcc is missing: install the package gcc")
    for archive, package in ARCHIVES.items():
        if not _archive(compiler, archive).is_absolute():  # gcc repeats the name of what it does not have
            raise FreezeError(f"{archive} is missing: install the package {package}")
    return compiler


def _digest(header: str, compiler: str, library: Path) -> str:
    """Return what identifies a build: all that goes into it."""
    digest = hashlib.sha256(header.encode())
    digest.update((HERE / "launcher.c").read_bytes())
    digest.update(" ".join((*FLAGS, *LIBRARIES)).encode())
    digest.update(_output(compiler, "--version").encode())
    for path in (library, *(_archive(compiler, archive) for archive in ARCHIVES)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _build(built: Path, header: str, compiler: str, include: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="podwall-freeze-") as name:
        directory = Path(name)
        (directory / "modules.h").write_text(header, encoding="ascii")
        shutil.copy(HERE / "launcher.c", directory)
        command = [compiler, *FLAGS, f"-I{include}", "launcher.c", str(library), *LIBRARIES, "-o", "podwall"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FreezeError("gcc failed:\n" + "\n".join(_errors(done.stderr)))
        executable = directory / "podwall"
        _try(executable)
        _replace(built, executable.read_bytes())


def _errors(stderr: str) -> Iterator[str]:
    """Yield what gcc said but for its warnings about name services, which the binary does not use."""
    for line in stderr.splitlines():
        if "warning:" not in line and "in function" not in line:
            yield line


def _try(executable: Path) -> None:
    done = subprocess.run(
        [executable],
        input="{}",
        env={"CNI_COMMAND": "VERSION"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if done.returncode or '"supportedVersions"' not in done.stdout:
        raise FreezeError(
            f"the executable does not run: status {done.returncode}, {done.stdout}{done.stderr}"
        )


def _replace(path: Path, data: bytes) -> None:
    """Write an executable so that there is always a whole one, also while the old one runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o755)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _archive(compiler: str, name: str) -> Path:
    return Path(_output(compiler, f"-print-file-name={name}").strip())


def _output(compiler: str, argument: str) -> str:
    return subprocess.run([compiler, argument], capture_output=True, text=True, check=True).stdout


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podwall"


if __name__ == "__main__":
    sys.exit(main())
