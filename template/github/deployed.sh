#!/usr/bin/env bash
# Prints commit=SHA of the newest successful deployment to an environment, by the CLI gh; nothing without one.
#   bash .github/deployed.sh ENVIRONMENT
set -euo pipefail
repository=repos/${GITHUB_REPOSITORY:?}
deployments=$(gh api "$repository/deployments?environment=$1&per_page=30" --jq '.[] | "\(.id) \(.sha)"')
while read -r id sha; do
  [ -n "$id" ] || continue
  states=$(gh api "$repository/deployments/$id/statuses" --jq '[.[].state] | join(" ")')  # all of them, also older ones
  case " $states " in *" success "*) echo "commit=$sha"; exit 0 ;; esac
done <<<"$deployments"
