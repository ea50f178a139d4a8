"""podwall's own image, made offline: Debian with Python and nftables, the dependencies, the wheel, the CNI
binary.

    root file system   cached by its packages
    dependencies       cached by requirements.lock
    podwall            cached by the sources: made again in seconds after a change

conf/Dockerfile makes the same layout for users.
"""

import configparser
import sys
import tomllib
import zipfile
from pathlib import Path

from tests.cluster.cache import digest, entry, remove
from tests.cluster.console import run
from tests.cluster.images import Content, Image, architecture, write_archive, write_layer
from tests.cluster.packages import root_archive
from tests.cluster.versions import AGENT_PACKAGES

PROJECT = Path(__file__).resolve().parents[2]
SITE = "usr/local/lib/python3.11/dist-packages"  # where bookworm's Python looks
PYTHON = "3.11"
PLATFORMS = {"amd64": "x86_64", "arm64": "aarch64"}
SCRIPT = "#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
SOURCES = ("pyproject.toml", "README.md", "LICENSE")
PACKAGES = ("agent", "cni", "conf", "lab")


def name() -> str:
    """Return the image's name, podwall:VERSION."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return f"podwall:{project['version']}"


def base_layers() -> tuple[Path, ...]:
    """Return the layers that change seldom; the offline nodes hold them from the start."""
    return (root_archive("agent", AGENT_PACKAGES), dependencies_layer())


def image() -> Image:
    """Return the image, its layers built where missing."""
    layers = (*base_layers(), own_layer())
    return Image((f"docker.io/library/{name()}",), layers, ("/usr/local/bin/podwall-agent",))


def save(place: Path) -> None:
    """Write the whole image into one archive."""
    write_archive(place, [image()])


def dependencies_layer() -> Path:
    """Return the layer with what requirements.lock names."""
    lock = PROJECT / "requirements.lock"
    return entry("image-dependencies", digest(lock, SITE), lambda place: build_dependencies(lock, place))


def build_dependencies(lock: Path, place: Path) -> None:
    """Fetch the locked wheels for the image's Python, whatever runs here, and pack them."""
    work = place.with_name(f"{place.name}-site")
    remove(work)
    machine = PLATFORMS[architecture()]
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    words += ["--target", work, "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    words += [f"--platform=manylinux_2_{minor}_{machine}" for minor in (17, 28, 34)] + [
        "--platform=manylinux2014_x86_64"
    ]
    run([*words, "--no-deps", "--require-hashes", "-r", lock], limit=600)
    remove(work / "bin")
    write_layer(place, site_files(work))
    remove(work)


def site_files(site: Path) -> dict[str, Content]:
    """Name a directory's files as they lie in the image, compiled where this Python is the image's."""
    if sys.version_info[:2] == tuple(map(int, PYTHON.split("."))):
        options = ["-q", "-j0", "--invalidation-mode=unchecked-hash"]
        run(
            [sys.executable, "-m", "compileall", *options, "-s", site, "-p", f"/{SITE}", site],
            limit=300,
        )
    return {f"{SITE}/{path.relative_to(site)}": path for path in site.rglob("*") if path.is_file()}


def own_layer() -> Path:
    """Return the layer with podwall's wheel, its commands and the CNI binary."""
    sources = [PROJECT / each for each in SOURCES if (PROJECT / each).exists()]
    sources += sorted(path for each in PACKAGES for path in (PROJECT / each).rglob("*") if is_source(path))
    key = digest(Path(__file__), [str(path.relative_to(PROJECT)) for path in sources], *sources)
    return entry("image-layer", key, build_own)


def is_source(path: Path) -> bool:
    """Say whether a file goes into the wheel or the binary."""
    return path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"


def build_own(place: Path) -> None:
    """Build the wheel and the binary from a copy of the sources, and pack them."""
    work = place.with_name(f"{place.name}-work")
    remove(work)
    (work / "source").mkdir(parents=True)
    words = [each for each in (*SOURCES, *PACKAGES) if (PROJECT / each).exists()]
    run(["cp", "--recursive", *[PROJECT / each for each in words], work / "source"])
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "wheel", *options, "-w", work, work / "source"], limit=300)
    site = work / "site"
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    files = site_files(site)
    for script, target in entry_points(site).items():
        module, function = target.split(":")
        path = work / script
        path.write_text(SCRIPT.format(module=module, function=function))
        path.chmod(0o755)
        files[f"usr/local/bin/{script}"] = path
    run(
        [sys.executable, "-m", "cni.freeze", work / "cni"],
        cwd=PROJECT,
        limit=300,
        env={"PYTHONPATH": str(PROJECT)},
    )
    files["opt/podwall/podwall"] = work / "cni"
    write_layer(place, files)
    remove(work)


def entry_points(site: Path) -> dict[str, str]:
    """Read the commands that the wheel declares."""
    parser = configparser.ConfigParser()
    parser.read(next(site.glob("*.dist-info/entry_points.txt")))
    return dict(parser["console_scripts"])
