#!/bin/sh
# Waits until the supervisor's process ends (its end of the pipe closes), then kills what is left
# of its HAProxy processes, listed in DIR/pids, and removes DIR.
# Usage: reap_haproxy.sh DIR
dir=$1

while read -r _; do :; done

while read -r pid; do
    # The process id may belong to another process by now: HAProxy's names a file in DIR.
    if grep -qs "$dir/" "/proc/$pid/cmdline"; then
        kill -9 "$pid"
    fi
done < "$dir/pids"

rm -rf "$dir"
