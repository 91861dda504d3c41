#!/usr/bin/env bash
# Writes a report to GitHub with the CLI gh, once for each name: the text of before is replaced.
#   bash .github/comment.sh pull NUMBER NAME FILE    a comment on a pull request
#   bash .github/comment.sh issue TITLE NAME FILE    a comment on the open issue with this title, which is opened if needed
set -euo pipefail
kind=$1 place=$2 name=$3 file=$4
repository=repos/${GITHUB_REPOSITORY:?}
body=$(mktemp)
trap 'rm -f "$body"' EXIT
{ echo "<!-- report: $name -->"; head -c 60000 "$file"; } >"$body"  # GitHub's limit is 65,536 characters

if [ "$kind" = issue ]; then
  number=$(gh api "$repository/issues?state=open&per_page=100" --paginate \
    --jq ".[] | select(.title == \"$place\" and .pull_request == null) | .number" | head -1)
  [ -n "$number" ] || number=$(gh api "$repository/issues" -f title="$place" -f body="Reported by the workflow." --jq .number)
else number=$place; fi

comment=$(gh api "$repository/issues/$number/comments" --paginate \
  --jq ".[] | select(.body | startswith(\"<!-- report: $name -->\")) | .id" | head -1)
if [ -n "$comment" ]; then gh api --method PATCH "$repository/issues/comments/$comment" -F body=@"$body" --jq .html_url
else gh api "$repository/issues/$number/comments" -F body=@"$body" --jq .html_url; fi
