#!/usr/bin/env bash
# When text, not FLOPs, is short: a quarter of a megabyte, read 4 to 16 times by the default model,
# by the same layers run once, and by those layers looped in the last third of training only. How
# low does each get, and after how many passes? Three seeds: some 70 minutes of one core; TUNE=1
# tries two learning rates for seed 0.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "import common, figures; common.run_script(figures.pyplot)"
[ -d data/short ] || python -m runs.short text data/short

run() {  # model passes rate seed flags; a pass has 64 steps
    echo "${*:5} --max-steps $(($2 * 64)) --muon-lr $3 --adamw-lr $3 --seed $4 --out out/short/$1-$2-$3-$4"
}
every() {  # rate seed
    for passes in 4 6 8 12 16; do
        run once $passes $1 $2 --mean-recurrence 1
        run looped $passes $1 $2
        run late $passes $1 $2 --loop-from 0.667
    done
}
{
    for seed in 0 1 2; do every 3e-2 $seed; done
    [ -z "${TUNE:-}" ] || every 1e-2 0
} | xargs -P "${JOBS:-2}" -L 1 python train.py --overwrite --compile --data data/short \
    --eval-every 512 --eval-sequences 236  # 8 * 236 in the end: all of val
python -m runs.short out/short results
