# SPDX-License-Identifier: Apache-2.0
"""The two ways a fine-tuning run ends early on purpose."""

from __future__ import annotations


class FinetuneError(ValueError):
    """A wrong argument, a malformed file, or a damaged checkpoint.

    The message names it, and says what was expected and what came.
    """


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived. `checkpoint` is the folder to resume from, or None if nothing was trained yet."""

    def __init__(self, checkpoint: str | None) -> None:
        super().__init__(f"interrupted; checkpoint: {checkpoint}")
        self.checkpoint = checkpoint
