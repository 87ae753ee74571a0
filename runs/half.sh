#!/usr/bin/env bash
# The title claim, small: does a looped model reach a transformer of twice its parameters? Same tokens (12.3M), three seeds, rates
# tuned alike. Half an hour on two cores, two runs at a time; TUNE=1 tries two other rates too (another 20 minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() {  # name rate seed flags
    echo "${*:4} --muon-lr $2 --adamw-lr $2 --seed $3 --out out/half/$1-$2-$3"
}
each() {  # rate seed
    run looped $1 $2
    run plain $1 $2 --preset gpt-nano
    run deep $1 $2 --preset gpt-nano --n-prelude 8
    run wide $1 $2 --preset gpt-nano --n-embd 48
}
{
    for seed in 0 1 2; do
        each 3e-2 $seed
        run longer 3e-2 $seed --preset gpt-nano --max-steps 100000 --max-flops 1.1831e13  # as many FLOPs as the looped one
    done
    if [ -n "${TUNE:-}" ]; then each 1.5e-2 0; each 6e-2 0; fi
} | xargs -P "${JOBS:-2}" -L 1 python train.py --overwrite --compile --n-embd 32 --block-size 128 --batch-size 32 --max-steps 3000 \
    --eval-every 1000 --eval-sequences 128
python runs/half.py out/half results
