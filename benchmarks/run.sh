#!/bin/sh
# Runs every benchmark with its defaults; `make bench` calls it.
set -eu
cd "$(dirname "$0")"
python kernels/coded_matmul.py "$@"
python kernels/cached_attention.py
python kernels/kv_page.py
python prompt_filter.py
