#!/usr/bin/env bash
# The whole recipe on one GPU against the clock: both stages side by side (the UNet compiles while the VAE trains), then
# export and evaluation. usage: one_gpu.sh DATA RUN RESULTS [seconds at which UNet training ends; default 480]
# RESULTS gets, as early as each exists: the VAE, the exported model as tar parts of 15 MiB, logs, eval.json, sheets.
# SMOKE="--smoke --limit 240" in the environment makes it a test of a few steps.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$1 run=$2 results=$3 until=${4:-480}
mkdir -p "$run" "$results"
rm -f "$run/latents.pt" # a stale file would start the UNet on another VAE's latents

python3 "$here/train.py" --data "$data" --run "$run" --stage unet --unet-until "$until" ${SMOKE:-} >"$results/unet.txt" 2>&1 &
unet=$!
if ! python3 "$here/train.py" --data "$data" --run "$run" --stage vae ${SMOKE:-} >"$results/vae.txt" 2>&1; then
    tail -5 "$results/vae.txt"
    kill "$unet"
    exit 1
fi
grep '^vae' "$results/vae.txt" | tail -2
tar cf "$results/vae.tar" -C "$run" vae vae_log.json
wait "$unet" || { tail -5 "$results/unet.txt"; exit 1; }
grep '^unet' "$results/unet.txt" | tail -4
mkdir -p "$run/export"
cp "$run"/*_log.json "$run/export/"
python3 "$here/export.py" --run "$run" --out "$run/export/emoji_sd" || exit 1
tar cf "$run/export.tar" -C "$run" export
sha256sum <"$run/export.tar" # compare after: cat RESULTS/export.tar.* | sha256sum
split -b 15M "$run/export.tar" "$results/export.tar."
python3 "$here/evaluate.py" --data "${EVAL_DATA:-$data}" --model "$run/export/emoji_sd" --out "$results" --vae-sheet ${EVAL_ARGS:-} 2>&1 |
    grep -E '^eval|Error'
