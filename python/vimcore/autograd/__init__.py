# SPDX-License-Identifier: Apache-2.0
"""torch's autograd over the C++ core; no arithmetic."""
