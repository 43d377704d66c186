"""Before anything imports torch: OpenMP threads of the tests sleep while they wait, as the workers' do."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
