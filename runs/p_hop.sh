#!/usr/bin/env bash
# How many lookups can a model do with T loops? Train models on p-hop induction (see runs/p_hop.py):
# one layer looped 8 or 4 times on average; the same layer run once, for equal tokens or for the
# FLOPs of the layer looped 8 times; eight layers; and two narrower layers of equal size and FLOPs.
# Takes an hour on two cores for one seed. SEEDS="0 1 2" makes the published table.
# Writes table and picture to out/; RESULTS=results replaces the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "from parts import cli, figures; cli.run_script(figures.pyplot)"
[ -d data/p-hop ] || python -m runs.p_hop text data/p-hop
for seed in ${SEEDS:-0}; do
    layer="--n-prelude 0 --n-recurrent 1 --n-coda 0"
    eight="--n-prelude 8 --n-recurrent 0 --n-coda 0"
    echo --seed $seed --out out/p-hop/layers-$seed $eight --max-steps 2000
    echo --seed $seed --out out/p-hop/looped-$seed $layer --mean-recurrence 8 --max-steps 2000
    echo --seed $seed --out out/p-hop/mean4-$seed $layer --mean-recurrence 4 --max-steps 2000
    echo --seed $seed --out out/p-hop/once-$seed $layer --mean-recurrence 1 --max-steps 2000
    echo --seed $seed --out out/p-hop/longer-$seed $layer --mean-recurrence 1 --max-flops 3.11e13
    echo --seed $seed --out out/p-hop/two-$seed --n-prelude 2 --n-recurrent 0 --n-coda 0 \
        --n-embd 52 --n-head 2 --max-flops 3.11e13
done | xargs -P "${JOBS:-2}" -L 1 python train.py --preset parcae-nano --overwrite --compile --data data/p-hop \
    --n-embd 64 --n-head 4 --no-value-embeds --block-size 192 --batch-size 32 \
    --muon-lr 3e-2 --adamw-lr 1e-2 --eval-sequences 64
python -m runs.p_hop out/p-hop "${RESULTS:-out}"
