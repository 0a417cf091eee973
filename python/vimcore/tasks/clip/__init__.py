# SPDX-License-Identifier: Apache-2.0
"""Images with captions."""
