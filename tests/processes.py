# SPDX-License-Identifier: Apache-2.0
"""How the processes of a distributed test end."""

import os
import time
from pathlib import Path


def leave_together(mine: Path, all_results: list[Path], seconds: float = 120.0) -> None:
    """Ends this process, which has written `mine`, once the others have written theirs and so need it no more.

    At once, without destructors: the last reference to a gloo group may be a DistributedDataParallel's, which is freed
    with the GIL held, and waits for gloo's thread, which may wait for the GIL to free its last work (torch 2.13). A
    run hung there.
    """
    assert mine.exists()
    end = time.monotonic() + seconds
    while not all(path.exists() for path in all_results):
        if time.monotonic() > end:
            raise TimeoutError(f"no result of {[str(p) for p in all_results if not p.exists()]}")
        time.sleep(0.01)
    os._exit(0)
