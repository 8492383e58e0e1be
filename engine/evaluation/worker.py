"""A lane's process: JSON lines in, JSON lines out. Run as ``python -m engine.evaluation.worker``.

The first message describes the lane; the reply describes what was loaded. Each further message is a
prompt to encode or to answer. An idle lane waits in a read, so it takes nothing from the running one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from engine.errors import SlipstreamError
from engine.evaluation.peers import Lane, build_lane
from engine.requests import SamplingParams


def answer(lane: Lane, message: dict[str, Any]) -> dict[str, Any]:
    """Reply to one message."""
    if "encode" in message:
        return {"ids": lane.encode(message["encode"])}  # type: ignore[attr-defined]
    sampling = SamplingParams(**message.pop("sampling"))
    return {"sample": lane.generate(sampling=sampling, **message), "peak_memory_mb": lane.peak_memory_mb()}


def main() -> None:
    # Libraries print to stdout; replies get their own copy of it, and stdout becomes stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lane: Lane | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if lane is None:
                lane = build_lane(message)
                reply: dict[str, Any] = {"lane": lane.describe()}
            else:
                reply = answer(lane, message)
        except SlipstreamError as error:
            reply = {"error": str(error)}
        except Exception as error:  # whatever a peer raises: the other lanes go on
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
