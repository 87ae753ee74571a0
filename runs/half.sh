#!/usr/bin/env bash
# Does a looped model reach a transformer of twice its size on the same tokens? 1/4/1 layers, the
# middle four looped 8 times on average, compete with six layers and twelve layers without a
# loop, six layers that are 1.4 times as wide, and six layers trained for equal FLOPs. There are no
# value embeddings, since their number would double with the layers. Each model has the rate that is
# best for its seed 0, which does not count. The most important runs come first.
#
#   CHANNELS=32 bash runs/half.sh        4.1M tokens: about an hour on one core
#   CHANNELS=32 SEEDS="0 1 2 3 4 5" TUNE="8e-3 1.6e-2 3.2e-2 6.4e-2" bash runs/half.sh
#                                        seed 0 at other rates, too
#   bash runs/half.sh                    64 channels, 20M tokens: about 8 hours on one core
#   CHANNELS=128 MODELS="looped plain deep" bash runs/half.sh
#                                        20M tokens, minutes on a GPU (with JOBS=14 there)
# Writes table and picture to out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"

channels=${CHANNELS:-64}
models=${MODELS:-looped plain deep wide longer}
case $channels in  # longer: training FLOPs of the looped model
    32) out=out/half-32 tokens=4.096e6 longer=1.197e13 size="--block-size 128 --batch-size 32" ;;
    64) out=out/half tokens=2e7 longer=2.313e14 size="" ;;
    128) out=out/half-128 tokens=2e7 longer=7.38e14 size="--n-head 4 --batch-size 64" ;;
    256) out=out/half-256 tokens=2e7 longer=2.578e15 size="--n-head 8 --batch-size 64" ;;
    *) echo "half.sh: CHANNELS is $channels, must be 32, 64, 128 or 256" >&2; exit 2 ;;
esac
rate_of() {  # model
    case $channels-$1 in
        32-looped) echo 3.2e-2 ;;
        32-*) echo 1.6e-2 ;;
        64-deep) echo 5e-3 ;;
        64-plain | 64-longer) echo 2e-2 ;;
        64-*) echo 1e-2 ;;
        *) echo 2e-2 ;;
    esac
}
six="--preset gpt-nano --n-prelude 6"
run() {  # model rate seed
    budget="--max-tokens $tokens"
    case $1 in
        looped) flags="--n-recurrent 4 --mean-recurrence 8" ;;
        plain) flags=$six ;;
        longer) flags=$six budget="--max-flops $longer" ;;
        deep) flags="--preset gpt-nano --n-prelude 12" ;;
        wide) flags="$six --n-embd $((channels * 23 / 64 * 4))" ;;
    esac
    echo "--n-embd $channels $size $flags $budget --muon-lr $2 --seed $3" \
        "--out $out/$1-$2-$3"
}
{
    for seed in ${SEEDS:-0 1 2 3}; do
        for model in $models; do run $model $(rate_of $model) $seed; done
    done
    for rate in ${TUNE:-}; do
        for model in $models; do
            [ $rate = $(rate_of $model) ] || run $model $rate 0
        done
    done
} | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite --compile --no-value-embeds \
    --eval-every 1000 --eval-sequences 236
python -m runs.half $out "${RESULTS:-out}"
