"""Where questions are asked from: the network of a Pod, a node or the outside machine, with the Python and
the clock of this one.

A container's processes are found on this machine by its id in their control group; entering their network
namespace alone is enough to be that Pod or node for every packet.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import ask, cluster, kube
from tests.cluster.ask import Answer, Question
from tests.cluster.console import ENDS_WITH_US, ClusterError, run, wait_for

PROGRAM = (sys.executable, "-S", "-E", str(Path(ask.__file__)))


@dataclass(frozen=True, slots=True)
class Asker:
    """A place that can ask: its name, and a process in its network namespace."""

    name: str
    pid: int

    def words(self) -> list[str]:
        """Return the words before a command that is to run in this place's network."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask all questions, each over a connection of its own, and return the answers in order."""
        text = json.dumps([asdict(each) for each in questions])
        printed = run([*self.words(), *PROGRAM], stdin=text.encode(), limit=120)
        return [Answer(**each) for each in json.loads(printed)]

    def one(self, question: Question) -> Answer:
        """Ask one question."""
        return self.ask([question])[0]


def outside() -> Asker:
    """Return the machine outside the cluster."""
    return container(cluster.OUTSIDE)


def node(name: str) -> Asker:
    """Return a node."""
    return container(name)


def container(name: str) -> Asker:
    """Return a container of the engine: a node or the outside machine."""
    identity = cluster.docker("inspect", "--format", "{{.Id}}", name).strip()
    return Asker(name, process_of(identity))


def pod(namespace: str, name: str) -> Asker:
    """Return a running Pod."""
    found = kube.get("pod", name, f"--namespace={namespace}")[0]
    identity = found["status"]["containerStatuses"][0]["containerID"].rsplit("/", 1)[1]
    return Asker(name, process_of(identity))


def process_of(identity: str) -> int:
    """Return a container's first process; those that others run in it come and go."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if identity in (entry / "cgroup").read_text() and is_first(entry):
                    found.append((depth(entry), int(entry.name)))
    if not found:
        raise ClusterError(f"no process of this machine runs in the container {identity[:12]}")
    return min(found)[1]


def is_first(process: Path) -> bool:
    """Say whether a process is the first of its process namespace."""
    return numbers(process)[-1] == "1"


def depth(process: Path) -> int:
    """Return how deep in process namespaces a process is: a Pod's are one deeper than its node's."""
    return len(numbers(process))


def numbers(process: Path) -> list[str]:
    """Return a process' numbers, from this machine's process namespace to its own."""
    lines = (process / "status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith("NSpid:"))


@contextlib.contextmanager
def another_address(addresses: Sequence[str]) -> Iterator[None]:
    """Give the outside machine more addresses, and let the nodes know the way back to them."""
    own = {version: str(cluster.outside_address(version)) for version in (4, 6)}
    via = {each: own[6 if ":" in each else 4] for each in addresses}
    every_right = ["exec", "--privileged", cluster.OUTSIDE, "ip", "address"]
    try:
        for address in addresses:
            cluster.docker(*every_right, "replace", address, "dev", "lo")
            for name in cluster.nodes():
                cluster.on_node(name, "ip", "route", "replace", address, "via", via[address])
        yield
    finally:
        for address in addresses:
            for name in cluster.nodes():
                cluster.on_node(name, "ip", "-6" if ":" in address else "-4", "route", "flush", address)
            cluster.docker(*every_right, "delete", address, "dev", "lo")


class Stream:
    """Questions asked at a steady rate since the start, and their answers."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def so_far(self) -> list[tuple[Question, Answer]]:
        """Return every question that has been answered, with its answer, in the order of the answers."""
        text = self._log.read_text()
        pairs = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [(ask.question(asked), Answer(**answer)) for asked, answer in pairs]

    def await_last(self, what: str, fits: Callable[[Answer], bool], limit: float = 10) -> None:
        """Wait until the latest answer fits."""
        wait_for(what, lambda: fits(self.so_far()[-1][1]), limit=limit, every=0.1)

    def end(self) -> list[tuple[Question, Answer]]:
        """Ask no more, and return all answers once the last has come."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        if self._process.wait(timeout=30):
            raise ClusterError(f"the stream of questions ended with {self._process.returncode}")
        return self.so_far()


@contextlib.contextmanager
def asking(asker: Asker, questions: Sequence[Question], rate: float) -> Iterator[Stream]:
    """Ask the questions in turn, `rate` times a second, while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "answers"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*ENDS_WITH_US, *asker.words(), *PROGRAM, str(rate)], stdin=subprocess.PIPE, stdout=file
            )
        try:
            assert process.stdin
            process.stdin.write(json.dumps([asdict(each) for each in questions]).encode())
            process.stdin.close()
            stream = Stream(process, log)
            wait_for(f"a first answer to {asker.name}", stream.so_far, limit=20, every=0.05)
            yield stream
        finally:
            process.kill()
            process.wait()
