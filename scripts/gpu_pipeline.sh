#!/usr/bin/env bash
# The paper's pipeline at real model size, on the data set glyphs: search the scales; train the plain network with them,
# RepVGG, and the plain network under SGD; quantize. Made for a machine with one GPU that is at hand for minutes, without
# network: gpu_common.sh says what can be set.
#
#   bash scripts/gpu_pipeline.sh [PART]       # search, target, repvgg, sgd or int8; without one, the next that is not done
#   cp output/gpu/scales.pth benchmarks/glyphs-scales.pth    # after the search: the other parts find it on another machine
#   python scripts/gpu_rows.py output/gpu     # keeps what was found, in benchmarks/ and docs/
#   DEVICE=cpu TINY=1 ARCH=RepOpt-VGG-nano bash scripts/gpu_pipeline.sh search       # tries the script without a GPU
#
# Each part takes at most LIMIT seconds, and trains for 240 epochs or as many as fit. Networks stay in RUNS (default
# output/gpu-runs), where int8 finds those of target and repvgg, or else trains both. SCALES names a scale file.
source "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
parts=(search target repvgg sgd int8) which=${1:-next} runs=${RUNS:-output/gpu-runs${TINY:+-tiny}}
if [ "$which" = next ]; then
  for name in "${parts[@]}"; do
    if wanted "glyphs-$name"; then which=$name; break; fi
  done
  if [ "$which" = next ]; then say "all parts are done"; exit; fi
elif [[ " ${parts[*]} " != *" $which "* ]]; then
  echo "gpu_pipeline.sh: there is no part '$which' (allowed: ${parts[*]}, next)" >&2
  exit 2
fi
needed=()
[ "$which" = int8 ] && needed=(torchao onnx onnxscript onnxruntime safetensors)
prepare "${needed[@]}"
PARTS="glyphs-$which" # also if it is done already
tiny=(--dataset digits --presets fbgemm --epochs 20 --tried 0) # a preset for all CPUs
[ "$which" = search ] && tiny+=(--epochs 3 --tried 2)
part "glyphs-$which" "$LIMIT" "$PYTHON" scripts/gpu_pipeline.py "$which" --arch "$ARCH" --device "$DEVICE" \
  --seconds "$((LIMIT - SECONDS - 15))" --runs "$runs" ${SCALES:+--scales "$SCALES"} \
  ${TINY:+"${tiny[@]}"} --json "$OUT/glyphs-$which.json"
exit "$failed"
