#!/usr/bin/env bash
# Everything that only a GPU can show, the most important first: its ceilings, the CUDA tests, the hyper-search, trainings,
# optimizers, kernels, input, accuracy, inference. Made for a machine with one GPU that is at hand for minutes, without
# network: gpu_common.sh says how such a run is cut into parts, and what can be set.
#
#   bash scripts/gpu_check.sh                                             # at most 480 s; again: the parts that are missing
#   python scripts/gpu_rows.py output/gpu                                 # keeps what was found, in benchmarks/ and docs/
#   DEVICE=cpu TINY=1 ARCH=RepOpt-VGG-nano bash scripts/gpu_check.sh      # tries the script without a GPU
source "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
prepare sklearn=scikit-learn torchmetrics pytest xdist=pytest-xdist hypothesis torchao pycocotools \
  segmentation_models_pytorch=segmentation-models-pytorch

if [ -n "$TINY" ]; then
  modes=(off) rounds=(--rounds 1) steps=1 small_images=256 epochs=1 large=(--batch-size 4 --image-size 32 --compile off) small=("${large[@]}") photographs=8
  only=(-k not_finite)
else
  modes=(off default reduce-overhead) rounds=(--rounds 5 --seconds 15) steps=100 small_images=10000 epochs=80
  large=(--batch-size 256) small=(--batch-size 32) photographs=256 only=(--numprocesses 6)
fi

measure() { # NAME SECONDS ARGUMENTS...: a part by benchmark.py
  part "$1" "$2" "$PYTHON" scripts/benchmark.py "${@:3}" --device "$DEVICE" --json "$OUT/$1.json"
}

# What is compiled: while the tests run, and nothing is timed yet, each of these is done once for the compiler's cache.
search=(hyper-search --arch "$ARCH" --only search --compile "${modes[@]}" --steps "$steps")
train_256=(train --arch "$ARCH" --no-largest "${large[@]}")
train_32=(train --arch "$ARCH" --no-largest "${small[@]}")
optimizer=(optimizer --arch "$ARCH")
infer=(infer --arch "$ARCH" ${TINY:+--batch-size 4 --image-size 32})
compiling=()
trap 'kill "${compiling[@]}" 2> /dev/null; rm -rf "$WORK"' EXIT
compile() { # NAME ARGUMENTS...
  if [ -n "$TINY" ] || ! wanted "$1"; then return; fi
  timeout "$((LIMIT - SECONDS < 120 ? LIMIT - SECONDS : 120))" "$PYTHON" scripts/benchmark.py "${@:2}" --rounds 1 --device "$DEVICE" --json "$WORK/$1.json" &> /dev/null &
  compiling+=($!)
}

measure ceilings 40 device --only ceilings "${rounds[@]}"
compile hyper-search "${search[@]}"
compile train-256 "${train_256[@]}"
compile train-32 "${train_32[@]}"
compile optimizer "${optimizer[@]}"
compile infer "${infer[@]}"
SHOWN=15 REPOPT_TEST_DEVICE=$DEVICE part tests 130 "$PYTHON" -m pytest -p no:cacheprovider -m cuda "${only[@]}" --durations 5 \
  tests/repopt/test_cuda.py tests/repopt/test_ecosystem.py tests/data/test_data_gpu_decode.py
((${#compiling[@]})) && wait "${compiling[@]}" && say "compiled"
measure hyper-search 75 "${search[@]}" "${rounds[@]}"
measure train-256 60 "${train_256[@]}" "${rounds[@]}"
measure optimizer 60 "${optimizer[@]}" "${rounds[@]}"
measure train-32 45 "${train_32[@]}" "${rounds[@]}"
measure largest 90 train --arch "$ARCH" "${small[@]}" --compile off --rounds 2
measure between-epochs 30 device --only between-epochs --arch "$ARCH" --rounds 2
measure kernels 45 device --only kernels --arch "$ARCH" --compile "${modes[-1]}"
measure small-images 40 data --only small-images --small-images "$small_images" "${rounds[@]}"
measure decode 50 decode --batch-size "$photographs" "${rounds[@]}"
measure digits 60 device --only digits --epochs "$epochs"
measure infer 60 "${infer[@]}" "${rounds[@]}"
"$PYTHON" scripts/gpu_rows.py --show "$OUT"
exit "$failed"
