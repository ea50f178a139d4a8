"""An agent killed at any moment: the next one finds ledger and kernel, and makes them agree."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.pods.world import Namespace, Namespaces, agent, kernel_links, kernel_rows, key
from tests.agent.waiting import eventually

KILLS = int(os.environ.get("PODWALL_TEST_KILLS", "12"))

CHURN = """
import asyncio, random
from pathlib import Path
from agent.pods.attachments import Attachments
from cni.spec import CniError
from tests.agent.pods.world import CIDRS, Namespace, Settings, agent, key

async def churn(a, number, name):
    while True:
        try:
            if key(f"c{{number}}") in a.attachments.current:
                await a.attachments.delete(key(f"c{{number}}"))
            else:
                await a.add(f"c{{number}}", Namespace(name))
                print("added", number, flush=True)
        except CniError as error:
            print("refused", error.msg, flush=True)
        await asyncio.sleep(random.random() / 200)

async def main():
    async with agent(Path({directory!r})) as a:
        print("ready", flush=True)
        await asyncio.gather(*(churn(a, i, name) for i, name in enumerate({names!r})))

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", [1])
def test_killed_at_any_moment(node: Namespace, namespaces: Namespaces, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    pods = [namespaces.new() for _ in range(8)]
    program = CHURN.format(directory=str(tmp_path), names=[pod.name for pod in pods])

    async def recovered() -> int:
        async with agent(tmp_path) as a:
            await eventually(lambda: not a.attachments.leaving)
            assert a.rows() == kernel_rows(), "ledger and kernel differ"
            attached = list(a.attachments.current.values())
            addresses = [address for each in attached for address in each.addresses]
            assert len(addresses) == len(set(addresses)) == 2 * len(attached)
            assert kernel_links() == {each.link for each in attached}
            for each in attached:
                with Namespace(Path(each.netns).name).descriptor() as fd:
                    assert await a.wiring.check(each, fd) == []
            return len(attached)

    adopted = 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            time.sleep(chance.random() / 10)
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read()
        assert "refused" not in said, said
        adopted += asyncio.run(recovered())
    assert adopted, "no Pod ever lived through a kill: the test shows nothing"

    async def end() -> None:
        async with agent(tmp_path) as a:
            await asyncio.gather(*(a.attachments.delete(key(f"c{i}")) for i in range(len(pods))))
            await eventually(lambda: not kernel_links())

    asyncio.run(end())
