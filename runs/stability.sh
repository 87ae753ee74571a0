#!/usr/bin/env bash
# Which injection rule trains stably at which learning rate? Table 2 of the paper, for a small
# model. Takes six and a half minutes on two cores, two runs at a time.
# Writes table and picture to out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"
for rate in ${RATES:-1e-2 3e-2 1e-1 3e-1 1}; do
    for rule in add concat diagonal; do
        echo --injection $rule --muon-lr $rate --out out/stability/$rule-$rate
    done
done | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite \
    --n-embd 32 --block-size 128 --batch-size 32 --mean-recurrence 8 \
    --max-steps "${STEPS:-250}" --eval-every 20 --eval-sequences 32 \
    --eval-recurrence 1 2 4 8 16 32 64 || true  # runs that break off exit with 2
python -m runs.stability out/stability "${RESULTS:-out}"
