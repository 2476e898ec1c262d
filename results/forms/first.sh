#!/usr/bin/env bash
# The first calls of part A on a machine with two GPUs: bash first.sh 1, then 2 (under ten minutes each, four processes), 3 and 4 (a training a process); 5 and 6 are for one GPU.
#   DAT=folder-with-token-files  OUT=folder-for-rows  bash first.sh 1
# Every training is 8 x 512, d_v = 1, about 130 seconds where two share a GPU. Rows are appended to $OUT as they come.
set -u
here=$(cd "$(dirname "$0")" && pwd); : "${DAT:?folder with train.uint16.xz and val.uint16.xz}" "${OUT:?folder for the rows}"
small="rgain=1+cinit=published"; a="additive+bnorm"; r="@8e-3"
train() {  # GPU NAME SPEC...
    local gpu=$1 name=$2; shift 2
    CUDA_VISIBLE_DEVICES=$gpu TORCHINDUCTOR_CACHE_DIR=/tmp/forms/$name/i TRITON_CACHE_DIR=/tmp/forms/$name/t OMP_NUM_THREADS=4 \
        python3 -u "$here/forms.py" --out "$OUT/$name.jsonl" --seconds 594 "$@" >"$OUT/$name.log" 2>&1 &
}
case ${1:-} in
1)  train 0 a1 "$a=0.01$r" "$a=0.01+tgate=1$r" "$a=0.01$r#1" "$a=0.01+tgate=1$r#1"
    train 0 b1 "$a=0.03$r" "$a=0.03+tgate=1$r" "$a=0.03$r#1" "$a=0.03+tgate=1$r#1"
    train 1 c1 "mended+dv=1$r" "writeonly+dv=1+zscale=0$r" "mended+dv=1$r#1" "writeonly+dv=1+zscale=0$r#1"
    train 1 d1 "mended+dv=1+zscale=0.01$r" "mended+dv=1+$small+zscale=100$r" "mended+dv=1+zscale=0.01$r#1" "mended+dv=1+$small+zscale=100$r#1" ;;
2)  train 0 a2 "mended+dv=1+$small+ec=0+noise=0$r" "writeonly+dv=1+$small$r#1" "mended+dv=1+$small+ec=0+noise=0$r#1" "writeonly+dv=1+$small$r#2"
    train 0 b2 "mended+dv=1+$small+eps=1e-8$r" "$a=0.001$r" "mended+dv=1+$small+eps=1e-8$r#1" "$a=0.001$r#1"
    train 1 c2 "$a=0.1+$small+ec=1+noise=0.5$r" "mended+dv=1+$small$r#2" "$a=0.1+$small+ec=1+noise=0.5$r#1" "$a=0.1$r#1"
    train 1 d2 "writeonly+dv=1+zscale=0+ec=0+noise=0$r" "$a=0.01+ec=1+noise=0.5$r" "writeonly+dv=1+zscale=0+ec=0+noise=0$r#1" "$a=0.01+ec=1+noise=0.5$r#1" ;;
3)  c="$small+ec=1+noise=0.5"
    train 0 a3 "$a=0.01+$c$r"; train 0 b3 "writeonly+dv=1+$small+zscale=0$r"
    train 1 c3 "$a=0.01+$c$r#1"; train 1 d3 "writeonly+dv=1+$small+zscale=0$r#1" ;;
4)  c="$small+ec=1+noise=0.5+tgate=1"
    train 0 a4 "$a=0.01+$c$r"; train 1 b4 "$a=0.01+$c$r#1" ;;
5)  e="ec=0+noise=0.5"   # which part of EC it is: noise alone, then EC alone
    train 0 a5 "writeonly+dv=1+$small+$e$r" "$a=0.01+$small+$e$r" "writeonly+dv=1+$small+$e$r#1" "$a=0.01+$small+$e$r#1"
    train 0 b5 "writeonly+dv=1+$small+noise=0$r" "$a=0.01+$small+ec=1$r" "writeonly+dv=1+$small+noise=0$r#1" "$a=0.01+$small+ec=1$r#1" ;;
6)  c="$small+ec=1+noise=0.5"   # rates of the two best forms, kgain, and what is left of 3 and 4
    train 0 a6 "$a=0.01+$c@4e-3" "$a=0.01+$c@1.6e-2" "writeonly+dv=1+$small+kgain=1$r" "$a=0.01+$c+tgate=1$r"
    train 0 b6 "writeonly+dv=1+$small@4e-3" "writeonly+dv=1+$small@1.6e-2" "writeonly+dv=1+$small+kgain=1+ec=0+noise=0.5$r" "writeonly+dv=1+$small+zscale=0$r" ;;
*)  echo "bash first.sh 1 to 6" >&2; exit 2 ;;
esac
wait
cut -c1-200 "$OUT"/*.log
