#!/usr/bin/env bash
# Which parts of a looped model's recipe matter? Change one at a time in a small model: table 4 of
# the paper, and how many loops get a gradient. Takes 25 minutes on two cores, two runs at a time.
# Writes the table to out/; RESULTS=results replaces the published one.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
for seed in ${SEEDS:-0 1}; do
    echo --seed $seed --out out/ablation/as-it-is-$seed
    echo --seed $seed --out out/ablation/no-prelude-norm-$seed --no-prelude-norm
    echo --seed $seed --out out/ablation/per-batch-$seed --depth-sampling per-batch
    for depth in 1 4 99; do
        echo --seed $seed --out out/ablation/gradient-$depth-$seed --backprop-depth $depth
    done
done | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite --compile \
    --n-embd 32 --block-size 128 --batch-size 32 --max-steps 3000 \
    --muon-lr 3e-2 --adamw-lr 3e-2 --eval-every 1000 --eval-sequences 128
python -m runs.ablation out/ablation "${RESULTS:-out}"
