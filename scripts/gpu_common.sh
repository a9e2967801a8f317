# Sourced by gpu_check.sh and gpu_pipeline.sh: what they need to run in parts on a machine with a GPU that is at hand for
# a short while, and without network.
#
# Every part has a time limit of its own, and leaves a row in $OUT/results.jsonl when it ends, however it ends; what it
# printed is in $OUT/log.txt. A part that has ended well before, in $OUT or in benchmarks/gpu.jsonl, under the same setting,
# is left out: so two short runs add up. `python scripts/gpu_rows.py $OUT` keeps what was found. In the environment:
#
#   LIMIT   seconds in all (default 480)
#   OUT     folder of the results (default output/gpu, or output/gpu-tiny)
#   PARTS   names of parts that are done whether they were before or not, and no others
#   ARCH    model (default RepOpt-VGG-B1)
#   DEVICE  cuda or cpu (default cuda)
#   TINY    1: as small as can be, which tries the script; as that is done on slow machines, parts have five times as long
#   PYTHON  interpreter (default python3)
#
# What the machine lacks travels beside the tree as wheels in .whl, which a machine with network fills (the processor's and
# the interpreter's names are those of the GPU machine):
#
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest .whl PACKAGE...
#
# where PACKAGE... are those that the script says are missing, and what they need in turn.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
LIMIT=${LIMIT:-480} DEVICE=${DEVICE:-cuda} ARCH=${ARCH:-RepOpt-VGG-B1} TINY=${TINY:-} PARTS=${PARTS:-} PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/output/gpu${TINY:+-tiny}} WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
# Programs that were compiled for another GPU, or while nothing was timed, are not those of this run.
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton
[ "$DEVICE" = cpu ] && export CUDA_VISIBLE_DEVICES= # also for what takes a GPU where there is one
mkdir -p "$OUT" && touch "$OUT/results.jsonl"
failed=0 log=$OUT/log.txt rows=$OUT/results.jsonl setting="$DEVICE, $ARCH${TINY:+, tiny}" slowness=${TINY:+5}
slowness=${slowness:-1}

say() { # TEXT: with the time, on the screen and in the log
  echo "[$SECONDS s] $*" | tee -a "$log"
}

prepare() { # MODULE[=PACKAGE]...: install the wheels; end, with one line, where these or what all need is still missing
  if compgen -G '.whl/*.whl' > /dev/null; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
      --target "$WORK/site" .whl/*.whl || exit
    export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
  fi
  machine=$("$PYTHON" scripts/gpu_machine.py "$DEVICE" torch yacs timm torchvision simplejpeg tqdm \
    tensorboard matplotlib "$@") || exit 2
  say "$setting; $machine"
}

wanted() { # NAME: whether a part is to be done
  if [ -n "$PARTS" ]; then [[ " $PARTS " == *" $1 "* ]]; return; fi
  ! grep -qsF "{\"part\": \"$1\", \"exit\": 0, \"setting\": \"$setting\"," benchmarks/gpu.jsonl "$rows"
}

part() { # NAME SECONDS COMMAND...: at most so long, and no longer than is left; what it left in $OUT/NAME.json is in its row
  local name=$1 seconds=$(($2 * slowness)) left=$((LIMIT - SECONDS - 5)) from=$SECONDS code=0 result=
  shift 2
  if ! wanted "$name"; then return; fi
  if ((left < 10)); then say "$name: left out, no time"; return; fi
  rm -f "$OUT/$name.json" # of a run that was killed
  timeout -k 5 "$((seconds < left ? seconds : left))" "$@" > "$WORK/printed" 2>&1 || code=$?
  { echo "===== $name: $*"; cat "$WORK/printed"; } >> "$log"
  if [ -e "$OUT/$name.json" ]; then
    result=", \"result\": $(tr -d '\n' < "$OUT/$name.json")"
    rm "$OUT/$name.json"
  fi
  printf '{"part": "%s", "exit": %d, "setting": "%s", "seconds": %d, %s%s}\n' \
    "$name" "$code" "$setting" "$((SECONDS - from))" "$machine" "$result" >> "$rows"
  say "$name: exit $code after $((SECONDS - from)) s"
  tail -n "${SHOWN:-6}" "$WORK/printed"
  if ((code)); then failed=1; fi
}
