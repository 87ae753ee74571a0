#!/usr/bin/env bash
# Which rule makes the best loop? Train the default model with each rule in runs/arena.py. The table
# averages seeds 1 to 3; seed 0 is trained at other rates, too.
#
#   bash runs/arena.sh                                  rate 2e-2; seed 0 also at 1e-2 and 4e-2
#   RULES="add concat" RATE=1e-2 OTHER= bash runs/arena.sh     rules that seed 0 trains best there
# A run takes six minutes on one core, all of them four hours on two. Writes table and picture to
# out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"
rules=${RULES:-diagonal add concat zero-order-hold euler first-loop loop-vector over-n deepnorm
    streams every-loop growing}
rate=${RATE:-2e-2}
run() {  # rule rate seed
    echo --rule "$1" --muon-lr "$2" --seed "$3" --out "out/arena/$1-$2-$3"
}
{
    for other in ${OTHER-1e-2 4e-2}; do
        for rule in $rules; do run $rule $other 0; done
    done
    for seed in 0 1 2 3; do
        for rule in $rules; do run $rule $rate $seed; done
    done
} | xargs -P "${JOBS:-2}" -L 1 python -m runs.arena --overwrite --max-steps "${STEPS:-1200}" \
    --eval-every 100000
python -m runs.arena --table out/arena "${RESULTS:-out}"
