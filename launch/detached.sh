#!/usr/bin/env bash
# On a host of a TPU: runs a command that goes on when the ssh connection ends. tpu.sh uses it. Its files are in the
# directory in which it is called.
#
#   launch/detached.sh start COMMAND ARGUMENTS...   what it prints is added to train.log
#   launch/detached.sh stop                         SIGTERM, upon which training saves, and waits for its end
#   launch/detached.sh status                       "running", the exit status, or "not running"

idle() {
  flock --nonblock train.lock true # all processes of the command keep it locked as long as they are there
}

case $1 in
  start)
    exec 9>>train.lock
    flock --nonblock 9 || { echo "error: $(hostname) is training already; stop that first." >&2 && exit 2; }
    shift
    rm -f train.status
    # bash waits for the command when both get SIGTERM, to note its status.
    nohup setsid bash -c 'trap : TERM; "$@"; echo $? >train.status' detached "$@" >>train.log 2>&1 </dev/null &
    echo $! >train.pid
    ;;
  stop)
    idle && exit
    kill -TERM -- "-$(<train.pid)"
    flock --timeout 300 train.lock true || kill -KILL -- "-$(<train.pid)"
    ;;
  status)
    if ! idle; then echo running; else cat train.status 2>/dev/null || echo "not running"; fi
    ;;
  *)
    echo "error: start, stop or status, not '$1'." >&2
    exit 2
    ;;
esac
