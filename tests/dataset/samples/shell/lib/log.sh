log() {
  local message="$*"
  printf '%s %s\n' "$(date +%T)" "$message" >&2
}
