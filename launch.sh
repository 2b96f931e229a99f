#!/usr/bin/env bash
# Sets up .venv if need be, then runs a command in as many processes as it needs. See --help.
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # the real one, if called through a link
venv=$root/.venv
python=$venv/bin/python

usage() {
  cat <<'HELP'
./launch.sh                              set up .venv, then train configs/run/quickstart.yaml here
./launch.sh train CONFIG [a.b=c ...]     train; the same command again resumes (--fresh starts over)
./launch.sh COMMAND ...                  any moe-runtime command; ./launch.sh help lists them
./launch.sh test [--all] [PYTEST ...]    run the tests; --all with the slow ones

One machine runs as many processes as the config's layout needs, under torch's elastic agent: NCCL and
one process per GPU where there are GPUs, gloo otherwise. Ranks that die or hang are started again from the last
checkpoint (reliability.restarts).
Ctrl-C or SIGTERM saves a checkpoint and ends with 0; once more ends at once, with 130. After SIGTERM the
run folder has preempted.json, which the next start tells of and removes.

Options, before the command, for `train`:
  --nnodes N --node-rank R --master HOST:PORT   one of N machines; the same command on each
  --nnodes MIN:MAX ...                          goes on with MIN machines, as long as no more are there,
                                                with fewer data-parallel replicas and the same batch
  --hostfile FILE                               start all of them from here with the deepspeed
                                                launcher (ssh, pdsh); lines `host slots=PROCESSES`
  --hostfile FILE --node-rank R [--master ...]  the same without ssh: this machine alone, on each
  --mpi [--hostfile FILE]                       start the ranks with mpiexec, here or on those machines
  --slurm [--nnodes N]                          print a batch file for Slurm; starts nothing
  --nproc N                                     processes on each machine, if not what the layout says

Set-up needs Python 3.11 or newer and nothing else, and takes minutes once. Environment:
  PYTHON           the Python to make .venv with
  TORCH_INDEX_URL  where to get torch, such as https://download.pytorch.org/whl/cpu
Exit codes: 0 done, 1 defect or failed test, 2 your mistake (one line says which), 3 a process was
lost and restarts did not help, 4 memory ended, 130 stopped at once.
HELP
}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.14) found
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  found=$("${candidates[0]}" --version 2>/dev/null || echo none)
  fail "${candidates[0]}: expected Python 3.11 or newer, found $found; install one, or set PYTHON to one"
}

set_up() {
  local stamp=$venv/.installed wanted found torch_pin
  # The folder counts too: when it is moved, the installed package would still point to the old one.
  wanted=$(echo "$root" | cat - "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  rm -f "$stamp" # an interrupted set-up is done again
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    found=$(find_python)
    echo "launch.sh: making .venv with $("$found" --version)" >&2
    "$found" -m venv --clear "$venv" || fail "cannot make .venv; on Debian: apt install python3-venv"
  fi
  local began=$SECONDS
  echo "launch.sh: installing (1 of 2): torch, some hundred MB and some minutes" >&2
  # torch first, from the index for this machine's hardware: what depends on it would fetch another.
  torch_pin=$(grep '^torch==' "$root/constraints.txt")
  "$python" -m pip install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch_pin" >&2 ||
    fail "pip could not install $torch_pin; see above"
  echo "launch.sh: installing (2 of 2): the other packages" >&2
  "$python" -m pip install --quiet -c "$root/constraints.txt" -e "${root}[data,test,mpi,report,dashboard]" >&2 ||
    fail "pip could not install the dependencies; see above"
  echo "$wanted" >"$stamp"
  echo "launch.sh: installed in $((SECONDS - began)) s" >&2
}

options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --nnodes | --node-rank | --master | --hostfile | --nproc)
      [[ $# -ge 2 ]] || fail "$1 needs a value; see --help"
      options+=("$1" "$2") && shift 2 ;;
    --mpi | --slurm | --*=*) options+=("$1") && shift ;;
    *) fail "unknown option $1; see --help" ;;
  esac
done
[[ $# -gt 0 ]] || set -- train "$root/configs/run/quickstart.yaml"

set_up
case $1 in
  help) exec "$python" -m moe_runtime --help ;;
  test)
    shift
    marker=(-m "not slow")
    if [[ ${1:-} == --all ]]; then marker=() && shift; fi
    cd "$root" && exec "$python" -m pytest ${marker[@]+"${marker[@]}"} "$@" ;;
  *) exec "$python" -m moe_runtime.cli.launch ${options[@]+"${options[@]}"} "$@" ;;
esac
