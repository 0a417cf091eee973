# SPDX-License-Identifier: Apache-2.0
"""What a network computes and why."""
