"""Before anything imports torch: OpenMP threads of the tests soon sleep when they wait, as the workers' do."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
