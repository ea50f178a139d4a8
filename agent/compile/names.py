"""What podwall calls its tables, chains, sets and comments in nftables.

Names and comments are for the person who types `nft list table inet podwall`. Names of cluster objects go
into comments only, never into the names of chains or sets: these carry a digest where they belong to one.
"""

import hashlib
import re

from agent.nft.model import TableName
from agent.nft.render import COMMENT_BYTES

TABLE = TableName("inet", "podwall")
SERVICES_TABLE = TableName("inet", "podwall_services")
ARP_TABLE = TableName("arp", "podwall")

LINK_PREFIX = "podwall"  # of a Pod link's host end: podwall and eight hexadecimal digits
DEVICE_PREFIX = "podwall-"  # of podwall's other devices, such as podwall-vxlan

DIGEST_DIGITS = 12
_HOLDABLE = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII but the quote and the backslash


def digest(*parts: str) -> str:
    """Twelve hexadecimal digits that stand for these parts, the same on every node and at every start."""
    joined = "".join(f"{len(part.encode())}:{part}" for part in parts)  # ("a", "b/c") is not ("a/b", "c")
    return hashlib.sha256(joined.encode()).hexdigest()[:DIGEST_DIGITS]


def comment(*parts: str) -> str:
    """Parts joined by slashes as nft takes a comment: what it cannot hold becomes '?', the middle may go."""
    text = "/".join(parts)
    if not _HOLDABLE.fullmatch(text):
        text = "".join(letter if _HOLDABLE.fullmatch(letter) else "?" for letter in text)
    if len(text) <= COMMENT_BYTES:
        return text
    mark = f"~{digest(*parts)}~"
    ends = COMMENT_BYTES - len(mark)
    return text[: ends - ends // 2] + mark + text[-(ends // 2) :]
