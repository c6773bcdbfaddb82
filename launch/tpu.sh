#!/usr/bin/env bash
# Trains on a Cloud TPU: one VM (--type=v5litepod-8), or a slice of a pod with many (--type=v5litepod-256).
#
#   launch/tpu.sh create --name=NAME --type=TYPE [--spot]    waits in the queue until the TPU is there
#   launch/tpu.sh train  --name=NAME [--commit=HEAD] -- --config=FILE --workdir=gs://BUCKET/RUN ...
#                                    installs the commit on all hosts and starts training, which goes on when ssh ends
#   launch/tpu.sh log    --name=NAME                         follows what the first host prints
#   launch/tpu.sh status --name=NAME                         of each host: running, or the exit status
#   launch/tpu.sh stop   --name=NAME                         saves and ends; `train` goes on
#   launch/tpu.sh fetch  --name=NAME --from=WORKDIR          copies a workdir, gs:// or of the first host, into runs/
#   launch/tpu.sh delete --name=NAME
#   launch/tpu.sh keep   (options of create and train)       all of it until training is done: creates a TPU that is not
#                                    there or was preempted, starts training that does not run. Runs on your machine.
#
# All take --zone=ZONE and --project=PROJECT (else those of `gcloud config`) and --dry-run, which prints the commands.
# TYPE is one of `gcloud compute tpus tpu-vm accelerator-types list`. Other options of create and keep go to `gcloud
# compute tpus queued-resources create`: --reserved, --network=... What follows -- are arguments of experiments.train.

# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC2154
. "$(dirname "$0")/common.sh"
options "name= type= spot commit= from= zone= project= dry-run" "$@"
action=${rest[0]}
more=("${rest[@]:1}")
tpus=(gcloud compute tpus)
where=()
[[ $zone ]] && where+=(--zone="$zone")
[[ $project ]] && where+=(--project="$project")

# remote WORKERS COMMAND [OPTIONS OF SSH]
remote() {
  local worker=$1 command=$2
  shift 2
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$worker" --command="cd ssm_jax && $command" "$@"
}

# https://cloud.google.com/tpu/docs/runtimes. Google rents TPU7x through GKE only.
runtime() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$type: the TPUs that can be had here are v2-N, v3-N, v4-N, v5litepod-N, v5p-N and v6e-N." ;;
  esac
}

# https://cloud.google.com/tpu/docs/queued-resources#states; nothing where there is none.
state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null
}

create() {
  local version
  version=$(runtime) || exit
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} "${more[@]}"
}

wait_until_active() {
  [[ $dry_run ]] && return
  local now
  until now=$(state) && [[ $now = ACTIVE ]]; do
    echo "$name: ${now:-unknown}"
    [[ $now = FAILED || $now = SUSPENDED ]] && exit 1
    sleep 30
  done
}

# The images have Python 3.10; uv brings another one.
install() {
  local archive="${TMPDIR:-/tmp}/ssm_jax-$sha.tar.gz"
  run git -C "$root" archive --format=tar.gz --output="$archive" "$sha" &&
    run "${tpus[@]}" tpu-vm scp "$archive" "$name:ssm_jax.tar.gz" "${where[@]}" --worker=all &&
    run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="mkdir -p ssm_jax && cd ssm_jax && \
tar xzf ../ssm_jax.tar.gz && python3 -m pip install -q --user uv && \
~/.local/bin/uv venv -q --allow-existing --python=3.12 && \
~/.local/bin/uv pip install -q -c constraints.txt -e '.[tpu]'"
}

# tpu,cpu: an error where there is no TPU, instead of training on the host.
start() {
  remote all "launch/detached.sh start env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m experiments.train \
$(quote "${train[@]}")"
}

# Where the network fails, or the TPU goes away in the middle of it, the next round sees to it.
keep() {
  local status failures=0
  while :; do
    case $(state) in
      "") create ;;
      FAILED | SUSPENDED) # preempted; what a queued resource had does not come back
        "$0" delete --name="$name" "${where[@]}" && create ;;
      ACTIVE)
        status=$(remote 0 "launch/detached.sh status" 2>/dev/null | tail -n 1)
        [[ $status = 1 ]] && ((++failures)) # another process was lost; but the data may also be broken
        case $status/$failures in
          running/*) ;;
          0/*) echo "$name: done" && exit ;;
          2/* | 1/5) echo "error: training ended with $status: $0 log --name=$name" >&2 && exit "$status" ;;
          /*) install && start ;; # a new TPU
          *) remote all "launch/detached.sh stop" && install && start ;; # stopped, or a host was lost
        esac ;;
    esac
    sleep 60
  done
}

case $action in
  create | keep) only_options "${more[@]}" ;;
  *) nothing "${more[@]}" ;;
esac
case $action in
  create) required name type && create && wait_until_active ;;
  train) required name && required_training && resolve_commit && install && start ;;
  log) required name && remote 0 "tail -n 100 -F train.log" -- -t ;;
  status) required name && remote all "echo \$(hostname): \$(launch/detached.sh status)" ;;
  stop) required name && remote all "launch/detached.sh stop" ;;
  fetch)
    required name from && run mkdir -p "$root/runs"
    case $from in
      gs://*) run gcloud storage cp --recursive "$from" "$root/runs/" ;;
      *)
        [[ $from = /* ]] || from=ssm_jax/$from
        run "${tpus[@]}" tpu-vm scp --recurse "$name:$from" "$root/runs/" "${where[@]}" --worker=0 ;;
    esac ;;
  delete) required name && run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  keep)
    required name type && required_training && resolve_commit && runtime >/dev/null
    if [[ $dry_run ]]; then create && install && start; else keep; fi ;;
  *) fail "'$action' is not create, train, log, status, stop, fetch, delete or keep; see --help." ;;
esac
