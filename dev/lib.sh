# shellcheck shell=bash
# Sourced by the scripts in dev/ after env.sh: messages, timings, locks.

say() { printf '%s\n' "$*" >&2; }

fail() {
	say "error: $*"
	exit 1
}

# timing WHAT START prints how long a step took; START is the value of $SECONDS when it began.
timing() { printf '%6ss  %s\n' "$((SECONDS - $2))" "$1" >&2; }

# serialize NAME lets one script at a time pass; the lock goes with the process.
serialize() {
	mkdir -p "$NIB_CACHE/locks"
	exec {lock}>"$NIB_CACHE/locks/$1"
	flock "$lock"
}
