#!/usr/bin/env bash
# Half the parameters? Does a looped model reach a transformer of twice its size on the same tokens
# (12.3M)? Three seeds. Half an hour on two cores, two runs at a time; TUNE=1 tries two other
# learning rates for each model, too (another 20 minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "import common, figures; common.run_script(figures.pyplot)"

run() {  # model rate seed flags
    echo "${*:4} --muon-lr $2 --adamw-lr $2 --seed $3 --out out/half/$1-$2-$3"
}
looped() { run looped $1 $2; }
plain() { run plain $1 $2 --preset gpt-nano; }
# as many FLOPs as the looped one
longer() { run longer $1 $2 --preset gpt-nano --max-steps 100000 --max-flops 1.1831e13; }
deep() { run deep $1 $2 --preset gpt-nano --n-prelude 8; }
wide() { run wide $1 $2 --preset gpt-nano --n-embd 48; }
{
    for seed in 0 1 2; do
        looped 3e-2 $seed
        plain 3e-2 $seed
        longer 3e-2 $seed
        deep 3e-2 $seed
        wide 6e-2 $seed
    done
    if [ -n "${TUNE:-}" ]; then
        for model in looped plain deep wide; do $model 1.5e-2 0; done
        for model in looped plain deep; do $model 6e-2 0; done
        wide 3e-2 0
        wide 1.2e-1 0
    fi
} | xargs -P "${JOBS:-2}" -L 1 python train.py --overwrite --compile \
    --n-embd 32 --block-size 128 --batch-size 32 --max-steps 3000 \
    --eval-every 1000 --eval-sequences 128
python -m runs.half out/half results
