#!/usr/bin/env bash
# Opens reports of runs of all kinds in Chromium, which is installed where it is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v chromium >/dev/null; then
    apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null
fi
"${PYTHON:-python3}" -m pip install --quiet playwright==1.65.2
exec "${PYTHON:-python3}" tests/browser/reports.py
