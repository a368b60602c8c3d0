# shellcheck shell=bash
# Sourced by the scripts in dev/ after env.sh: messages, timings, locks.

say() { printf '%s\n' "$*" >&2; }

fail() {
	say "error: $*"
	exit 1
}

# timing WHAT START prints how long a step took; START is the value of $SECONDS when it began.
timing() { printf '%6ss  %s\n' "$((SECONDS - $2))" "$1" >&2; }

# compile_go build|install LDFLAGS ARGUMENTS... gives way to other work. The compiler frees memory less often and writes no debug
# information, which nothing reads: both together took 0.87 of the time for helm.
compile_go() {
	local verb=$1 flags=$2
	shift 2
	CGO_ENABLED=${CGO_ENABLED:-0} GOGC=400 nice go "$verb" -trimpath -gcflags all=-dwarf=false -ldflags "-s -w $flags" "$@" \
		2> >(grep -v '^go: downloading ' >&2)
}

# serialize NAME lets one script at a time pass; the lock goes with the process.
serialize() {
	mkdir -p "$NIB_CACHE/locks"
	exec {lock}>"$NIB_CACHE/locks/$1"
	flock "$lock"
}
