#!/usr/bin/env bash
# Half the parameters? Does a looped model reach a transformer of twice its size on the same tokens
# (20M)? 64 channels: 1/4/1 layers, the middle four looped 8 times on average, against six and
# twelve layers without a loop, six layers 1.4 times as wide, and six layers trained for as many
# FLOPs as the looped ones. Value embeddings would double with the layers: none. Three seeds, each
# model at the best of its rates for seed 0: about 6 hours of one core (a looped run 27 minutes);
# TUNE=1 tries the other rates, too (another 4 hours). The order is that of what matters.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "import common, figures; common.run_script(figures.pyplot)"

run() {  # model rate seed flags
    echo "${*:4} --muon-lr $2 --adamw-lr $2 --seed $3 --out out/half/$1-$2-$3"
}
six="--preset gpt-nano --n-prelude 6"
looped() { run looped $1 $2 --n-recurrent 4 --mean-recurrence 8 --max-tokens 2e7; }
plain() { run plain $1 $2 $six --max-tokens 2e7; }
longer() { run longer $1 $2 $six --max-flops 2.313e14; }
deep() { run deep $1 $2 --preset gpt-nano --n-prelude 12 --max-tokens 2e7; }
wide() { run wide $1 $2 $six --n-embd 92 --max-tokens 2e7; }
{
    for seed in 0 1 2; do
        looped 1e-2 $seed
        plain 2e-2 $seed
        deep 5e-3 $seed
        wide 1e-2 $seed
        longer 2e-2 $seed
    done
    if [ -n "${TUNE:-}" ]; then
        for rate in 5e-3 2e-2 4e-2; do looped $rate 0; done
        for rate in 1e-2 4e-2; do plain $rate 0; done
        for rate in 1e-2 2e-2 4e-2; do deep $rate 0; done
        for rate in 5e-3 2e-2; do wide $rate 0; done
        longer 1e-2 0
    fi
} | xargs -P "${JOBS:-2}" -L 1 python train.py --overwrite --compile --no-value-embeds \
    --eval-every 1000 --eval-sequences 236
python -m runs.half out/half results
