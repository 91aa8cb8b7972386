#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "$0")/../lib/log.sh"
. ./lib/paths.sh

for folder in "${folders[@]}"; do
  if [[ -d "$folder" ]]; then
    tar czf "$target/$(basename "$folder").tgz" "$folder"
  else
    log "missing: $folder"
  fi
done
