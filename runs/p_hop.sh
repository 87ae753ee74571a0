#!/usr/bin/env bash
# How many lookups can a model do with T loops? Train five models on p-hop induction (see
# runs/p_hop.py) for equal FLOPs: one layer looped 8 times on average; the same layer run once; two
# narrower layers, which have about as many parameters; four layers; eight layers. Each has the rate
# that is best for its seed 0.
#
#   bash runs/p_hop.sh                               seed 0: 10 to 25 minutes a run, on one core
#   SEEDS="0 1 2" TUNE="7.5e-3 1.5e-2 3e-2 6e-2" bash runs/p_hop.sh     three seeds, more rates:
#                                                    the published table has some of these runs
# Writes table and picture to out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"
[ -d data/p-hop ] || python -m runs.p_hop text data/p-hop
rate_of() {  # model
    case $1 in looped | once) echo 3e-2 ;; *) echo 1.5e-2 ;; esac
}
wide="--n-embd 64 --n-head 4"
run() {  # model rate seed
    case $1 in
        looped) flags="$wide --n-prelude 0 --n-recurrent 1 --mean-recurrence 8" ;;
        once) flags="$wide --n-prelude 0 --n-recurrent 1 --mean-recurrence 1" ;;
        two) flags="--n-embd 52 --n-head 2 --n-prelude 2 --n-recurrent 0" ;;
        four) flags="$wide --n-prelude 4 --n-recurrent 0" ;;
        eight) flags="$wide --n-prelude 8 --n-recurrent 0" ;;
    esac
    case $2 in 7.5e-3) third=2.5e-3 ;; 1.5e-2) third=5e-3 ;; 3e-2) third=1e-2 ;; 6e-2) third=2e-2 ;; esac
    echo "$flags --muon-lr $2 --adamw-lr $third --seed $3 --out out/p-hop/$1-$2-$3"
}
models="looped two eight four once"
{
    for seed in ${SEEDS:-0}; do
        for model in $models; do run $model $(rate_of $model) $seed; done
    done
    for rate in ${TUNE:-}; do
        for model in $models; do [ $rate = $(rate_of $model) ] || run $model $rate 0; done
    done
} | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite --compile --data data/p-hop \
    --n-coda 0 --no-value-embeds --block-size 192 --batch-size 32 --max-flops 3.11e13 \
    --eval-sequences 64
python -m runs.p_hop out/p-hop "${RESULTS:-out}"
