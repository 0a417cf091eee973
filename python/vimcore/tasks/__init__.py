# SPDX-License-Identifier: Apache-2.0
"""What is learnt: one file each."""
