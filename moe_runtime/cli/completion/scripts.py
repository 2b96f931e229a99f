"""The scripts that shells load: they hand the words up to the cursor to `moe-runtime complete`.

`launch.sh` is completed by what its own folder has installed, and not at all before that: a press of Tab must
not begin an installation. All answers come back one a line, `word<Tab>help`.
"""

# bash cuts words at = and :, so the line is taken as it stands; what bash holds for done is cut off again.
BASH = r"""# moe-runtime and launch.sh, for bash 4.4 or newer
_moe_runtime_program() {
  case $1 in
    *launch.sh) printf '%s' "${1%launch.sh}.venv/bin/moe-runtime" ;;
    *) printf '%s' "$1" ;;
  esac
}
_moe_runtime() {
  local program line=${COMP_LINE:0:COMP_POINT} word done='' tail i
  program=$(_moe_runtime_program "$1")
  command -v "$program" >/dev/null || return 0
  COMPREPLY=()
  tail=${line##*[[:space:]]}
  # Of the word, what bash takes for words of their own.
  for ((i = ${#tail} - 1; i >= 0; i--)); do
    if [[ ${tail:i:1} == [=:] && $COMP_WORDBREAKS == *"${tail:i:1}"* ]]; then
      done=${tail:0:i+1}
      break
    fi
  done
  while IFS=$'\t' read -r word _; do
    [[ $word == "$done"* || -z $done ]] || continue
    [[ $word == *[=.:/] ]] && compopt -o nospace 2>/dev/null
    COMPREPLY+=("$(printf '%q' "${word#"$done"}")")
  done < <("$program" complete --line "$line" 2>/dev/null)
}
complete -F _moe_runtime moe-runtime launch.sh ./launch.sh
"""

ZSH = r"""#compdef moe-runtime launch.sh
_moe_runtime() {
  local program=$words[1] line word said
  local -a whole open whole_said open_said
  [[ $program == *launch.sh ]] && program=${program%launch.sh}.venv/bin/moe-runtime
  (( $+commands[$program] )) || [[ -x $program ]] || return 1
  while IFS=$'\t' read -r word said; do
    if [[ $word == *[=.:/] ]]; then
      open+=("$word") open_said+=("$word  $said")
    else
      whole+=("$word") whole_said+=("$word  $said")
    fi
  done < <("$program" complete -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)
  (( $#open )) && compadd -U -S '' -l -d open_said -a open
  (( $#whole )) && compadd -U -l -d whole_said -a whole
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _moe_runtime "$@"
else
  compdef _moe_runtime moe-runtime launch.sh ./launch.sh
fi
"""

FISH = r"""function __moe_runtime_complete
    set -l words (commandline -opc)
    set -l program $words[1]
    string match -q '*launch.sh' -- $program
    and set program (string replace -r 'launch\.sh$' '.venv/bin/moe-runtime' -- $program)
    command -q $program
    or return
    command $program complete -- $words[2..-1] (commandline -ct) 2>/dev/null
end
complete -c moe-runtime -f -a '(__moe_runtime_complete)'
complete -c launch.sh -f -a '(__moe_runtime_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
