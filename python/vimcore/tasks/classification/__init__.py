# SPDX-License-Identifier: Apache-2.0
"""One label for an image."""
