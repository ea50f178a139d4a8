"""How long things may take: limits of waiting are for a machine of ordinary speed, and grow on a slow one.

Only waiting grows. What a test measures by counting, or by the order of things, stays as it is.
"""

from __future__ import annotations

import os

SLOWNESS = max(1.0, float(os.environ.get("PODWALL_TEST_SLOWNESS") or 1))
"""How many times slower than usual this machine is, as its user says; one without acceleration is 7 to 10
times slower."""
