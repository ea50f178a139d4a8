"""Tests on Debian's own kernel, in a machine without acceleration: python -m tests.vm [PYTEST-WORDS ...]

Without words the default choice runs. LIMIT is the most minutes that a run may take (40 by default);
PODWALL_TEST_SLOWNESS is how much slower than usual the tests may be (8 by default).
"""

import os
import sys

from tests.cluster.console import status_of, step
from tests.vm import contents, machine

DEFAULT = (
    "tests/agent/nft/test_nft_roundtrip.py",
    "tests/agent/pods/test_wiring.py",
    "tests/agent/routes/test_route_kernel.py",
    "tests/packet/test_spoofing.py",
    "tests/lab/test_lab_sctp.py",
    "tests/lab/test_lab_policy.py",
    "tests/lab/test_lab_service_examples.py",
)
"""What meets the kernel, each part once."""

MINUTES = 40
SLOWNESS = "8"


def main(words: list[str]) -> int:
    """Run the tests and return pytest's exit status."""
    built = contents.machine()
    environment = {
        "PODWALL_TEST_SLOWNESS": os.environ.get("PODWALL_TEST_SLOWNESS", SLOWNESS),
        "PODWALL_CNI": f"/{contents.PLUGIN}",
        "PY_COLORS": str(int(sys.stdout.isatty())),
    }
    limit = 60.0 * float(os.environ.get("LIMIT") or MINUTES)
    with machine.workplace() as place:
        sources = contents.sources(place, words or DEFAULT, environment)
        with step("the tests on Debian's kernel"):
            return machine.run(built, sources, place, limit)


if __name__ == "__main__":
    sys.exit(status_of(main))
