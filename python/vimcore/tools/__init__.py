# SPDX-License-Identifier: Apache-2.0
"""The work of the commands demo, predict, plan, doctor and bench, without the command line."""
