"""`python -m tests.campaign --cases 1500 --seed 0`: broken inputs by the thousand, and what convclip makes of them.

Every case must be refused in one line, counted, or right; anything else is printed with its kind and number, and the
exit code is 1. `--only KIND --case N` tries one again, with its traceback's place or message.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

# Before torch: two cores are shared, and these models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

from tests.campaign.judge import FAILED, judge, share_out, table
from tests.campaign.kinds import KINDS, WEIGHTS
from tests.conftest import REPOSITORY


def main() -> int:
    """The exit code: 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=1500, help="how many, at least, over all kinds (default 1500)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other damage (default 0)")
    parser.add_argument("--only", choices=KINDS, help="one kind")
    parser.add_argument("--case", type=int, help="with --only: this case alone, with what was said")
    parser.add_argument("--limit", type=int, default=10, help="seconds a case may take (default 10)")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    start, results = time.monotonic(), {}
    for name, count in share_out(arguments.cases, WEIGHTS).items():
        if arguments.only not in (None, name):
            continue
        results[name] = Counter()
        for number in range(count) if arguments.case is None else [arguments.case]:
            verdict = judge(name, KINDS[name], arguments.seed, number, arguments.limit)
            results[name][verdict.outcome] += 1
            if verdict.outcome == FAILED or arguments.case is not None:
                print(f"{name} seed {arguments.seed} case {number}: {verdict.outcome}: {verdict.detail}", flush=True)
    print(table(results))
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if any(counts[FAILED] for counts in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
