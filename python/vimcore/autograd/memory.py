# SPDX-License-Identifier: Apache-2.0
"""Device memory that torch holds and does not use, for allocations of the core."""

from __future__ import annotations

import torch

from .. import _core


def give_back(device: int, needed: int) -> bool:
    """Has torch's allocator free what it keeps for later; whether that was anything.

    The core asks before it raises for want of memory: its scratch memory and its weights in 16 bits do not
    come from torch. Not while this thread records a graph, which such a call would end.
    """
    del needed  # torch frees all or nothing
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return False
    before = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) < before


_core.set_give_back_memory(give_back)
