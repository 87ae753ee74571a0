#!/usr/bin/env bash
# Which first run shows a newcomer that looping gains? Try shapes and learning rates for the default
# model, each looped and with the same layers run once. Six hours on two cores, two runs at a time.
# Writes the table to out/; RESULTS=results replaces the published one.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run() {  # seed, rate, mean recurrence, flags of the shape
    echo --seed "$1" --muon-lr "$2" --mean-recurrence "$3" "${@:4}" \
        --out "out/first/$(echo "${*:4}" | tr -cd '0-9f')-$3-$2-$1"
}
one="--n-prelude 0 --n-recurrent 1 --n-coda 0"
{
    for loops in 1 4; do
        run 0 8e-3 $loops --n-prelude 0 --n-recurrent 2 --n-coda 0  # shapes
        run 0 8e-3 $loops --n-prelude 1 --n-recurrent 1 --n-coda 1
        for seed in 0 1 2 3; do run $seed 8e-3 $loops $one; done
        for rate in 4e-3 1.6e-2 3.2e-2 6.4e-2; do run 0 $rate $loops $one; done  # rates
        for seed in 0 1 2 3 4; do run $seed 2e-2 $loops $one; done  # the default
    done
    for seed in 0 1 2 3 4; do  # run once, for the FLOPs of the looped default
        echo --seed $seed --muon-lr 2e-2 --mean-recurrence 1 $one \
            --max-flops 7.2e12 --out out/first/flops-$seed
    done
    for rate in 5e-3 1e-2 4e-2; do
        echo --seed 0 --muon-lr $rate --mean-recurrence 1 $one \
            --max-flops 7.2e12 --out out/first/flops-$rate-0
    done
    rival="--n-prelude 2 --n-recurrent 0 --n-embd 52"  # two layers: equal parameters and FLOPs
    for seed in 0 1 2 3; do
        echo $rival --seed $seed --muon-lr 2e-2 --max-flops 7.2e12 \
            --out out/first/two-$seed
    done
    echo $rival --seed 0 --muon-lr 4e-2 --max-flops 7.2e12 --out out/first/two-4e-2
    for loops in 1 4; do  # rates at twice the width
        for rate in 8e-3 1.6e-2 3.2e-2 6.4e-2; do
            run 0 $rate $loops $one --n-embd 128 --n-head 4
        done
    done
    for seed in 0 1 2; do  # variants of the default
        run $seed 2e-2 4 $one --depth-sampling fixed
        for gradient in 1 64; do run $seed 2e-2 4 $one --backprop-depth $gradient; done
    done
    run 0 8e-3 8 $one
    run 0 1.28e-1 4 $one
} | xargs -P "${JOBS:-2}" -L 1 python train.py --overwrite --eval-every 100000
python -m runs.first out/first "${RESULTS:-out}"
