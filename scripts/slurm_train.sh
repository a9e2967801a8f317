#!/usr/bin/env bash
# Train on the nodes of a Slurm allocation, and on again after preemption, the time limit, or a lost node.
#
#   sbatch --nodes 2 scripts/slurm_train.sh --cfg configs/imagenet/b1_target.yaml --data-path IMAGENET --tag train \
#       --scales-path output/RepOpt-VGG-B1-hs/search/scales.pth
#
# Arguments are those of main_repopt.py. One task is one process with one GPU; the folder of the run is shared by the
# nodes. PYTHON chooses the interpreter. A job that has been requeued MAX_RESTARTS (3) times, for whatever reason, is not
# started again after a failure.
#SBATCH --job-name=repopt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over by itself

trap : USR1 TERM # they are for the tasks, which save and end; this script then decides
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
  exec "${PYTHON:-python}" main_repopt.py "$@"' task "$@"
code=$?

case $code in
  0 | 2) again=no ;; # done, or a mistake that another start does not mend
  75) again=yes ;; # interrupted, and saved
  *) [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-3}" ] && again=yes || again=no ;;
esac
# A job that its owner has cancelled is not running any more, and stays so.
if [ $again = yes ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  echo "exit code $code: job $SLURM_JOB_ID is requeued and goes on from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
