#!/bin/sh
# Appends the rows of benchmarks/results.csv, stage by stage; needs a GPU and a clean commit.
#
#     scripts/record_benchmarks.sh CSV [STAGE ...]
#
# Stages, with the minutes they take on an H100: models (4), graphs (4), memory (6), fp32 (2),
# medium (4), checkpointing (2), liger (2), ops (4), sweep (5). Without names: all of them. All but
# "models" and "liger" (which reads a number back) replay CUDA graphs, so that their figures are the
# GPU's and not the processor's. A stage that fails does not keep the others from running; the exit
# status is then 1.
set -u
csv=${1:?"usage: $0 CSV [STAGE ...]"}
shift
[ $# -gt 0 ] || set -- models graphs memory fp32 medium checkpointing liger ops sweep
case $csv in /*) ;; *) csv=$PWD/$csv ;; esac
cd "$(dirname "$0")/.." || exit
ddl="${PYTHON:-python3} deep_delta_cli.py bench"
all=ddl-scalar,ddl-cc,ddl-tc
six=$all,ddl-cc-no-ec,ddl-tc-no-ec
graphs=--cuda-graphs
failed=0
for stage in "$@"; do
    case $stage in
    models) $ddl model --variants $six --csv "$csv" ;;
    graphs) $ddl model --variants $six $graphs --csv "$csv" ;;
    memory) $ddl model --variants $all --rebuild speed,2,memory --modes train $graphs --csv "$csv" ;;
    fp32) $ddl model --variants ddl-scalar,ddl-cc --state-dtype float32 $graphs --csv "$csv" ;;
    medium) $ddl model --variants $all --size medium --batch 16 $graphs --csv "$csv" ;;
    checkpointing) $ddl model --variants $all --gradient-checkpointing --modes train $graphs --csv "$csv" ;;
    liger) $ddl model --variants ddl-cc --loss liger --modes train --csv "$csv" ;;
    ops) $ddl op --csv "$csv" ;;
    sweep) $ddl op --sweep --providers triton --ops read,additive --csv "$csv" ;;
    *) echo "there is no stage '$stage'" >&2; failed=1 ;;
    esac || failed=1
done
exit $failed
