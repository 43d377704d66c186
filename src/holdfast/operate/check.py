"""`holdfast check`: whether the weights that a running service has in memory are still what was loaded."""

from __future__ import annotations

import json

from holdfast.operate.client import Client
from holdfast.operate.config import CheckConfig


def run(url: str, config: CheckConfig) -> int:
    """Exit code: 0 when all are, 1 when some are not, or were not found out. Raises `ConfigError` for a service that
    is not there or refuses."""
    client = Client(url, config.service.api_key)
    found = client.ask("POST", "/cluster/check", config.service.timeout)
    try:
        ranks, wrong, lost = found["ranks"], found["wrong"], found["lost"]
        lines = [
            f"rank {rank['rank']}: {rank['bytes'] / 1e9:.3f} GB in {rank['seconds']:.2f} s: "
            + (f"changed: {', '.join(rank['wrong'])}" if rank["wrong"] else "as loaded")
            for rank in ranks
        ]
    except (KeyError, TypeError) as error:
        raise client.stranger() from error
    lines += [f"replica {replica}: does not serve, or was lost before all ranks were checked" for replica in lost]
    lines += [f"replica {replica} is started anew" for replica in sorted({rank.partition(".")[0] for rank in wrong})]
    print(json.dumps(found) if config.service.json else "\n".join(lines), flush=True)
    return 1 if wrong or lost else 0
