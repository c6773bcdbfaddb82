#!/usr/bin/env bash
# Trains on TPUs in a cluster of Google Kubernetes Engine that was made by xpk, https://github.com/AI-Hypercomputer/xpk.
#
#   launch/xpk.sh train  --name=NAME --cluster=CLUSTER --type=TYPE [--slices=1] [--restarts=50] --image=IMAGE \
#                        [--commit=HEAD] -- --config=FILE --workdir=gs://BUCKET/RUN ...
#                                  builds and pushes an image of the commit, and starts a process on each host of TYPE
#   launch/xpk.sh log    --name=NAME                       follows what the first host prints
#   launch/xpk.sh delete --name=NAME --cluster=CLUSTER     saves and ends; `train` goes on
#
# All take --zone=ZONE and --project=PROJECT (else those of `gcloud config`) and --dry-run, which prints the commands.
# TYPE is a slice, as v5litepod-256; IMAGE a name in a registry, as us-docker.pkg.dev/PROJECT/REPOSITORY/ssm_jax. Other
# options of train go to `xpk workload create`: --storage=..., --priority=... What follows -- are arguments of
# experiments.train. Preempted or after the loss of a host, training goes on by itself.

# shellcheck source-path=SCRIPTDIR source=common.sh disable=SC2154
. "$(dirname "$0")/common.sh"
options "name= cluster= type= slices= restarts= image= commit= zone= project= dry-run" "$@"
action=${rest[0]}
more=("${rest[@]:1}")
where=(--cluster="$cluster")
[[ $zone ]] && where+=(--zone="$zone")
[[ $project ]] && where+=(--project="$project")

# The Dockerfile and all else are those of the commit.
build() {
  run bash -c "set -o pipefail; git -C $(quote "$root") archive $sha |
  docker build --platform=linux/amd64 --file=launch/Dockerfile --tag=$(quote "$image:$sha") -" &&
    run docker push "$image:$sha"
}

# Restarts all hosts when a process ends with 75 (stopped, saved), and with 1, as it does when it lost another one: that
# this may also mean broken data is why restarts are counted. Those by a signal xpk adds (127 to 255). `exec`, for xpk
# sends SIGTERM to what it started.
submit() {
  run xpk workload create --workload="$name" "${where[@]}" --tpu-type="$type" --num-slices="${slices:-1}" \
    --docker-image="$image:$sha" --max-restarts="${restarts:-50}" --restart-on-exit-codes=1,75 \
    --termination-grace-period-seconds=60 "${more[@]}" \
    --command="exec env JAX_PLATFORMS=tpu,cpu python -m experiments.train $(quote "${train[@]}")"
}

if [[ $action = train ]]; then only_options "${more[@]}"; else nothing "${more[@]}"; fi
case $action in
  train) required name cluster type image && required_training && resolve_commit && build && submit ;;
  log)
    required name
    run kubectl logs --follow --tail=100 --all-containers --selector="jobset.sigs.k8s.io/jobset-name=$name,\
jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
  delete) required name cluster && run xpk workload delete --workload="$name" "${where[@]}" --force ;;
  *) fail "'$action' is not train, log or delete; see --help." ;;
esac
