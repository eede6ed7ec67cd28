#!/usr/bin/env bash
# Follows docs/fine-tune-a-language-model.md in a new folder, with its own code and the tiny model of
# `lora train --quick --out target/quick` instead of a downloaded one.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
page=$root/docs/fine-tune-a-language-model.md
tiny=$root/target/quick/tiny
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The block of the page whose first line begins with this, without that line.
block() {
  awk -v first="$1" '
    /^```/ { inside = !inside; fresh = inside; found = 0; next }
    fresh { found = index($0, first) == 1; fresh = 0; seen += found; next }
    inside && found
    END { exit !seen }' "$page"
}

cd "$work"
cargo new -q tune
cd tune
# The profiles and versions of tests/transformers, whose compiled dependencies are used again.
cp "$root/tests/transformers/Cargo.lock" .
export CARGO_TARGET_DIR=$root/target
block '# Dependencies' | sed "s|cargo add loralib|cargo add --path $root|" | bash -euo pipefail
sed -n '/^\[profile/,$p' "$root/tests/transformers/Cargo.toml" >> Cargo.toml
block '# The model file' | bash -euo pipefail
block '// src/models/llama.rs' >> src/models/llama.rs
for file in src/models/mod.rs src/data.rs src/main.rs src/bin/serve.rs; do
  mkdir -p "$(dirname "$file")"
  block "// $file" > "$file"
done
printf '{"prompt": "title : Red Fox | kind : pub", "completion": "Red Fox is a pub."}\n%.0s' {1..8} > train.jsonl

cargo run --bin tune -- "$tiny" train.jsonl 20 | tee first.log
grep -q '^step 20: loss' first.log
# Stopped and resumed: the options say more steps than were done.
cargo run --bin tune -- "$tiny" train.jsonl 30 | tee second.log
grep -q '^going on after step 20$' second.log
cargo run --bin serve -- "$tiny" adapter 'title : Red Fox | kind : pub' | tee reply.log
grep -q "[a-z]" reply.log
echo 'not JSON' >> train.jsonl
if cargo run --bin tune -- "$tiny" train.jsonl 40 2> error.log; then exit 1; fi
grep -q 'train.jsonl:9: ' error.log
