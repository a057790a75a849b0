#!/usr/bin/env bash
# Run a trainer and a rollout server as on two hosts, on one machine: in two network namespaces, connected by a veth pair, with a
# shared folder in place of a cluster's shared file system. Run it as root; it needs Debian's iproute2:
#
#   examples/two_hosts.sh MODEL PROMPTS.jsonl REWARD [options of trl grpo]
#
# On two real machines, run the commands under "on the server's host" and "on the trainer's host", without `ip netns exec`.
set -euo pipefail
model=$1 prompts=$2 reward=$3
shift 3

trainer=trl-trainer-$$ server=trl-server-$$ address=10.77.0.2 port=8000
shared=$(mktemp -d)
export VLLM_API_KEY=$(head -c 16 /dev/urandom | base64)

cleanup() {
    [ -z "${serving:-}" ] || kill "$serving" 2>/dev/null || true
    ip netns del "$trainer" 2>/dev/null || true
    ip netns del "$server" 2>/dev/null || true
    rm -rf "$shared"
}
trap cleanup EXIT

ip netns add "$trainer"
ip netns add "$server"
ip link add "t$$" netns "$trainer" type veth peer name "s$$" netns "$server"
ip -n "$trainer" address add 10.77.0.1/24 dev "t$$"
ip -n "$server" address add "$address/24" dev "s$$"
for each in "$trainer t$$" "$server s$$"; do
    read -r host cable <<<"$each"
    ip -n "$host" link set lo up
    ip -n "$host" link set "$cable" up
done

# on the server's host
ip netns exec "$server" trl serve "$model" --host "$address" --port "$port" &
serving=$!

# on the trainer's host
ip netns exec "$trainer" trl grpo --model_name_or_path "$model" --dataset_name "$prompts" --reward_funcs "$reward" \
    --use_vllm --vllm_mode server --vllm_server_base_url "http://$address:$port" --rollout_sync_dir "$shared/weights" "$@"
