"""How the benchmark talks with a peer that stays alive: JSON lines over stdin and stdout. Standard library only.

peer  → {"ready": true, "versions": {…}, "how": "…"}
bench → {"prompts": [[token ids], …], "output_len": 32}
peer  → {"seconds": …, "prefill_seconds": …, "decode_tokens": …, "tokens": [output of the first request]}
                                                                              … until stdin ends
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
Work = Callable[[list[list[int]], int], dict[str, Any]]
"""(prompts, output_len) → the reply. Every request gets `output_len` tokens, greedily, whatever they are.

`seconds` is the whole job, `prefill_seconds` of them until the last request had its first token, and `decode_tokens`
what came out after that.
"""


def converse(start: Callable[[], tuple[Work, dict[str, str], str]]) -> None:
    """Start the peer, then answer jobs. `start` returns the work, versions, and a word on how the peer is run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # one that is held still could not end by itself
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up between the replies
    work, versions, how = start()
    print(json.dumps({"ready": True, "versions": versions, "how": how}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(work(job["prompts"], job["output_len"])), file=replies, flush=True)
