# What the scripts beside it share: options, messages, and commands that are printed instead of run. For bash from 3.2
# on, which macOS has.
# shellcheck shell=bash disable=SC2034,SC2154

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
train=() # what follows --: arguments of experiments.train

# The comment at the head of the script.
usage() {
  awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# options "name= spot dry-run" "$@": sets the variable $name, and $spot and $dry_run to "yes". What follows -- becomes
# the array $train, other arguments the array $rest, among them other options, which are another program's.
options() {
  local known=" $1 " key option # not "name", which is an option
  for key in ${1//=/}; do printf -v "${key//-/_}" %s ""; done
  shift
  rest=()
  while (($#)); do
    case $1 in
      --help | -h) usage && exit ;;
      --) shift && train=("$@") && return ;;
      --*=*) key=${1%%=*} key=${key#--} option=$key= ;;
      --*) key=${1#--} option=$key ;;
      *) rest+=("$1") && shift && continue ;;
    esac
    case $known in
      *" $option "*) ;;
      *" $key= "*) fail "--$key needs a value: --$key=VALUE." ;;
      *" $key "*) fail "--$key takes no value." ;;
      *) rest+=("$1") && shift && continue ;;
    esac
    if [[ $option = *= ]]; then
      [[ ${1#*=} ]] || fail "--$key= is empty."
      printf -v "${key//-/_}" %s "${1#*=}"
    else
      printf -v "${key//-/_}" yes
    fi
    shift
  done
}

# Fails where an argument is no option.
only_options() {
  local argument
  for argument in "$@"; do
    [[ $argument = -* ]] || fail "unexpected argument '$argument'; options are written --NAME=VALUE."
  done
}

# Fails where there is an argument.
nothing() {
  (($# == 0)) || fail "unexpected argument '$1'; see --help."
}

# required name zone: fails where one of the variables is empty.
required() {
  local key
  for key in "$@"; do
    [[ ${!key} ]] || fail "--$key=... is missing; see --help."
  done
}

# Fails where no config or workdir follows --.
required_training() {
  local key
  for key in config workdir; do
    [[ " ${train[*]}" = *" --$key="* ]] ||
      fail "--$key=... is missing after --, as in: -- --config=configs/s4nd/digits.py --workdir=gs://BUCKET/digits"
  done
}

# The arguments as a shell reads them back.
quote() {
  local word quote="'" escaped="'\\''" space=""
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word="'${word//$quote/$escaped}'"
    printf '%s%s' "$space" "$word"
    space=" "
  done
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then quote "$@" && echo; else "$@"; fi
}

# Sets $sha to the short name of the commit $commit.
resolve_commit() {
  sha=$(git -C "$root" rev-parse --verify --quiet --short=12 "${commit:-HEAD}^{commit}") ||
    fail "--commit=${commit:-HEAD} is no commit of $root."
  [[ $commit || ! $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
    echo "note: changes that are not committed stay behind." >&2
}
