# SPDX-License-Identifier: Apache-2.0
"""torch's autograd over the C++ core; no arithmetic."""

from . import memory as memory  # from here on the core may ask torch for memory
