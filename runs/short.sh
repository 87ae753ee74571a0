#!/usr/bin/env bash
# Does looping help if text, not compute, is scarce? Train on 0.25 MB, read 4 to 16 times:
# parcae-nano, the same layers run once, and these layers looped only in the last third of
# training. Which loss does each reach, and after how many passes? Three seeds, or six near the
# lowest losses, take about 90 minutes on one core; TUNE=1 tries other learning rates for seed 0.
# Writes table and picture to out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"
[ -d data/short ] || python -m runs.short text data/short

run() {  # model passes rate seed flags; a pass has 64 steps
    echo "${*:5} --max-steps $(($2 * 64)) --muon-lr $3 --seed $4 --out out/short/$1-$2-$3-$4"
}
both() {  # rate seed passes ...
    for passes in "${@:3}"; do
        run once $passes $1 $2 --mean-recurrence 1
        run looped $passes $1 $2
    done
}
{
    for seed in 0 1 2 3 4 5; do both 3e-2 $seed 8 10 12; done
    for seed in 0 1 2; do
        both 3e-2 $seed 4 6 16
        for passes in 8 10 12; do run late $passes 3e-2 $seed --loop-from 0.667; done
    done
    if [ -n "${TUNE:-}" ]; then
        both 1e-2 0 8 16
        both 6e-2 0 6 8
    fi
} | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite --compile --data data/short \
    --eval-every 512 --eval-sequences 236  # 8 * 236 at the end: all of val
python -m runs.short out/short "${RESULTS:-out}"
