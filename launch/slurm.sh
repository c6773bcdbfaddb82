#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process per GPU. Goes on by itself when its time was over, when it was
# preempted and when a node failed.
#
#   launch/slurm.sh [--nodes=N] [--gpus-per-node=N] [OPTIONS OF SBATCH] -- --config=FILE --workdir=DIR ...
#
# As many processes are started on each node as it has GPUs; without --gpus-per-node one, on its CPUs. Options of sbatch
# are written --NAME=VALUE: --time=8:00:00, --partition=..., --cpus-per-task=..., --dry-run prints the command. The job
# runs in this checkout, which must have a .venv (`make .venv/installed ACCELERATOR=gpu`) and be seen by all nodes, as
# DIR must. What follows -- are arguments of experiments.train.
#
#   tail -F ssm_jax-JOB.log            what it prints
#   scancel JOB                        saves and ends; the same command goes on

# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC2154
. "$(dirname "$0")/common.sh"
options "gpus-per-node= dry-run" "$@"
only_options "${rest[@]}"
for option in "${rest[@]}"; do
  case $option in
    --gres=gpu* | --gpus=* | --gpus-per-task=* | --gpu-bind=* | --ntasks*)
      fail "$option: there is one process per GPU, all of a node; give --nodes=N and --gpus-per-node=N." ;;
  esac
done
required_training
[[ $dry_run || -x $root/.venv/bin/python ]] || fail "$root/.venv is missing; make .venv/installed ACCELERATOR=gpu."

tasks=1
if [[ $gpus_per_node ]]; then
  tasks=${gpus_per_node##*:} # h100:8
  [[ $tasks =~ ^[1-9][0-9]*$ ]] || fail "--gpus-per-node=$gpus_per_node: not a number, nor TYPE:NUMBER."
fi
run sbatch --chdir="$root" --ntasks-per-node="$tasks" ${gpus_per_node:+--gpus-per-node="$gpus_per_node"} "${rest[@]}" \
  "$root/launch/train.sbatch" "${train[@]}"
