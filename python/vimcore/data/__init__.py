# SPDX-License-Identifier: Apache-2.0
"""Images and labels: where they lie, how they are read, what becomes of them on the way to the network."""
